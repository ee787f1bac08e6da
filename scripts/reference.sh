#!/usr/bin/env bash
# Writes what follows from the configuration's schema: docs/config.md and configs/sdxl-train.schema.json.
source "$(dirname "$0")/venv.sh"
python -m trainer schema --markdown >docs/config.md
python -m trainer schema >configs/sdxl-train.schema.json

#!/usr/bin/env bash
# Everything that needs a GPU, measured on this machine's 1 to 8 cards; rows are added to docs/benchmarks.md.
#
#   benchmarks/gpu.sh                  an hour or two, 30 GB of disk; --help lists what may be changed
#   benchmarks/gpu.sh --dry            the same commands on a tiny model, on any machine, in minutes; nothing is written
if [ -z "${SDXL_TRAIN_PYTHON:-}" ]; then source "$(dirname "$0")/../scripts/venv.sh"; else cd "$(dirname "$0")/.."; fi
exec "${SDXL_TRAIN_PYTHON:-python}" -m benchmarks.gpu "$@"

#!/usr/bin/env bash
# The pages of docs/ as a site in build/site, for a browser and without a network; a broken link ends it.
source "$(dirname "$0")/venv.sh"
sphinx-build -W --keep-going -q -d build/doctrees docs build/site
echo "build/site/index.html"

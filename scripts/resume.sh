#!/usr/bin/env bash
# Go on with a run: scripts/resume.sh RUN_DIR [section.key=value ...]
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
run_dir=$(realpath "$1"); shift
source "$(dirname "$0")/venv.sh"
exec sdxl-train "$run_dir/config.resolved.yaml" --resume true "$@"

#!/usr/bin/env bash
# Validation loss, loss curve and sample grid: scripts/eval.sh RUN_DIR|CHECKPOINT [section.key=value ...]
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2s/^# //p' "$0" >&2; exit 2; }
target=$(realpath "$1"); shift
source "$(dirname "$0")/venv.sh"
exec sdxl-train eval "$target" "$@"

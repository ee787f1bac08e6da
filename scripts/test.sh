#!/usr/bin/env bash
# The whole check: format, lint, types, tests. `scripts/test.sh -m "not e2e and not slow" -n 2` is the quick part;
# other arguments go to pytest.
source "$(dirname "$0")/venv.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
ruff format --check .
ruff check .
pyright
if [ $# -gt 0 ]; then exec pytest "$@"; fi
pytest -m "not e2e and not slow" --numprocesses auto --dist worksteal
pytest -m "e2e and not slow" --numprocesses 2 --dist loadfile

#!/usr/bin/env bash
# The whole check: format, lint, types, tests. `scripts/test.sh -m "not e2e and not slow"` is the quick part, two
# to three minutes on two cores, of twenty in all; other arguments go to pytest as well.
source "$(dirname "$0")/venv.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONDONTWRITEBYTECODE # otherwise every process compiles its modules anew, pytest its rewritten ones
ruff format --check .
ruff check .

# Types are checked on one core while the tests run.
types=$(mktemp)
pyright >"$types" 2>&1 &
checker=$!
trap 'kill "$checker" 2>/dev/null || true; rm -f "$types"' EXIT
tests=0
run() { pytest --max-worker-restart=0 "$@" || tests=$?; } # a worker that was ended is not sent into the same test
if [ $# -eq 0 ]; then
    run -m "not e2e and not slow" --numprocesses auto --dist loadfile
    # The longest files of these come first, which xdist would undo: it begins with those of most tests.
    [ "$tests" -ne 0 ] || run -m "e2e and not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder
elif [ "$1" = -m ]; then # a choice from all tests
    run --numprocesses auto --dist loadfile "$@"
else
    run "$@"
fi
wait "$checker" || { cat "$types"; exit 1; }
cat "$types"
exit "$tests"

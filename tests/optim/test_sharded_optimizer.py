"""Sharded weights (FSDP2, two to four workers) get the update of whole ones, and state goes between both.

To the bit, but for torch's fused AdamW, which computes the last few elements of each tensor in another order, and for
kinds that sum over rows of all workers.
"""

import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.worker_group import run_group

sys.path.insert(0, str(Path(__file__).parent))
from sharded_optimizer_script import KINDS, SUMS, Weights, dtype_of, load_weights, run

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", params=[(2,), (3,), (4,), (4, 2)], ids=["2", "3", "4", "2 groups of 2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process and several wrote after 3 and 6 steps."""
    world, *within = request.param
    folder = tmp_path_factory.mktemp("sharded")
    for kind in KINDS:
        save_file(run(kind, Weights(dtype_of(kind)), None, range(3)), folder / f"{kind}-whole-3.safetensors")
        save_file(run(kind, Weights(dtype_of(kind)), None, range(6)), folder / f"{kind}-whole-6.safetensors")
    script = Path(__file__).parent / "sharded_optimizer_script.py"
    end = [str(number) for number in (world, *within)]
    commands = [[sys.executable, str(script), str(folder), str(rank), *end] for rank in range(world)]
    run_group(commands, [os.environ] * world, folder)
    return folder


def assert_same(kind: str, found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype
    if kind == "fused":
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-9)
    elif kind in SUMS:
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [3, 6])
def test_sharded_equals_whole(folder: Path, kind: str, steps: int) -> None:
    """After 6 steps: three of one process, read by several workers who went on."""
    whole = load_file(folder / f"{kind}-whole-{steps}.safetensors")
    sharded = load_file(folder / f"{kind}-sharded-{steps}.safetensors")
    assert whole.keys() == sharded.keys()
    for name, tensor in whole.items():
        assert_same(kind, sharded[name], tensor)


@pytest.mark.parametrize("kind", KINDS)
def test_one_process_goes_on_where_several_stopped(folder: Path, kind: str) -> None:
    weights = Weights(dtype_of(kind))
    state = load_weights(weights, load_file(folder / f"{kind}-sharded-3.safetensors"))
    found = run(kind, weights, state, range(3, 6))
    for name, tensor in load_file(folder / f"{kind}-whole-6.safetensors").items():
        assert_same(kind, found[name], tensor)

"""Runs with activations of some blocks in the host's memory take the steps of those without, to the bit."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.worker_group import run_group, worker_environments

SCRIPT = Path(__file__).parent / "shared_run_script.py"
STEPS = 3
# Accumulated passes, autocast, and weights that are gathered block by block.
RUNS = {1: ("single:bf16:2",), 2: ("ddp:bf16:2", "zero2:fp32:2", "zero3:bf16:1")}

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("world", RUNS)
def test_the_same_weights(world: int, tmp_path: Path) -> None:
    names = [name for run in RUNS[world] for name in (run, f"{run}:moved")]
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(STEPS), *names]
    run_group([command] * world, worker_environments(world), tmp_path)
    for run in RUNS[world]:
        plain, moved = (load_file(tmp_path / f"{name}.safetensors") for name in (run, f"{run}:moved"))
        assert plain.keys() == moved.keys()
        assert all(torch.equal(moved[name], weight) for name, weight in plain.items()), run

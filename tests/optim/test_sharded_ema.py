"""Averages of sharded weights (FSDP2) are those of whole ones, to the bit, also where 3 workers go on after 4."""

import os
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import equal

from tests.worker_group import run_group

sys.path.insert(0, str(Path(__file__).parent))
from sharded_ema_script import DTYPES, PLACES, PROFILES, Weights, run

from trainer.optim.ema import start_averages

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four workers wrote after 5 steps, and three after 10."""
    folder = tmp_path_factory.mktemp("sharded")
    script = Path(__file__).parent / "sharded_ema_script.py"
    for world in (4, 3):
        commands = [[sys.executable, str(script), str(folder), str(rank), str(world)] for rank in range(world)]
        run_group(commands, [os.environ] * world, folder)
    return folder


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", DTYPES)
def test_four_then_three_workers_equal_one(folder: Path, kind: str, place: str) -> None:
    weights = Weights(DTYPES[kind])
    averages = start_averages(dict(weights.named_parameters()), PROFILES)
    for steps in (range(1, 6), range(6, 11)):
        expected = run(weights, averages, steps)
        found = load_file(folder / f"{kind}-{place}-{steps[-1]}.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert equal(found[name], tensor), name

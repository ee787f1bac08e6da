"""Real runs of three workers whose gradients travel in fewer bytes: exact over a stop, and with fewer workers."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.data.small_set import write_small_set
from tests.wire.exchanged_run_script import RUNS, STEPS, STOP
from tests.worker_group import run_group, worker_environments
from trainer.checkpoint.manifest import read_manifest
from trainer.checkpoint.write import EXCHANGE
from trainer.data.buckets import Bucket

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).with_name("exchanged_run_script.py")
WITH_ERRORS = ("int8", "int4", "powersgd", "powersgd_narrow", "nan")


def run(folder: Path, model: Path, prepared: Path, world: int, names: Sequence[str], script: Path = SCRIPT) -> str:
    """Train; what the first worker printed."""
    command = [sys.executable, str(script), str(folder), str(model), str(prepared), *names]
    run_group([command] * world, worker_environments(world), folder)
    return (folder / "worker-0.log").read_text()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = {Bucket(64, 64): 30, Bucket(128, 64): 26}
    return write_small_set(tmp_path_factory.mktemp("data") / "prepared", rows)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, prepared: Path) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("three")
    return folder, run(folder, model_folder, prepared, 3, [*RUNS])


def hashes(run_dir: Path, step: int) -> dict[str, str]:
    entries = read_manifest(run_dir / f"checkpoints/step-{step:08d}")
    return {name: entry["xxh3_128"] for name, entry in entries.items() if name.endswith(".safetensors")}


def kept(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"checkpoints/step-{step:08d}" / EXCHANGE)


@pytest.mark.parametrize("name", RUNS)
def test_a_stop_changes_no_bit(three: tuple[Path, str], name: str) -> None:
    """Of weights, moments and what each worker keeps; the workers' weights are compared in the runs themselves."""
    folder, _ = three
    through, stopped = (hashes(folder / f"{name}-{way}", STEPS) for way in ("through", "stopped"))
    assert through == stopped and (EXCHANGE in through) == (name in WITH_ERRORS)
    assert hashes(folder / f"{name}-through", STOP) == hashes(folder / f"{name}-stopped", STOP) != through


@pytest.mark.parametrize("name", WITH_ERRORS)
def test_each_worker_keeps_errors_of_its_own(three: tuple[Path, str], name: str) -> None:
    tensors = kept(three[0] / f"{name}-through", STEPS)
    errors = {key: tensor for key, tensor in tensors.items() if key.startswith("error.")}
    assert errors and all(len(tensor) == 3 and tensor.dtype == torch.bfloat16 for tensor in errors.values())
    largest = max(errors.values(), key=torch.Tensor.numel)
    assert all(bool(row.any()) and not torch.equal(row, largest[0]) for row in largest[1:])
    assert not any(key.endswith(".bias") for key in errors)
    assert any(key.startswith("basis.") for key in tensors) == name.startswith("powersgd")


def test_the_log_says_how_gradients_travel(three: tuple[Path, str]) -> None:
    log = three[1].split("run int8")[1].split("run int4")[0]
    assert "gradients travel in 8 bits, with error feedback: each worker sends" in log
    assert "gradients travel in 32 bits: each worker sends" in three[1].split("run bf16")[0]


def test_a_step_that_is_skipped_leaves_nothing(three: tuple[Path, str]) -> None:
    assert "step 2 is skipped" in three[1].split("run nan")[1]


def test_fewer_workers_go_on_with_the_mean(
    three: tuple[Path, str], model_folder: Path, prepared: Path, tmp_path: Path
) -> None:
    folder, _ = three
    log = run(folder, model_folder, prepared, 2, ["int4", "powersgd"])
    told = "exchange.safetensors: the errors of 3 workers go on as their mean on each of 2"
    assert log.count(told) == 2
    for name in ("int4", "powersgd"):
        errors = [tensor for key, tensor in kept(folder / f"{name}-fewer", STEPS).items() if key.startswith("error.")]
        assert all(len(tensor) == 2 for tensor in errors)

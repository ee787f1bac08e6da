"""Workers in groups that each share a whole model: the steps of one worker, and checkpoints for any other way."""

import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.data.small_set import write_small_set
from tests.train.test_averages import assert_same_checkpoints
from tests.worker_group import run_group, worker_environments
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.load import to_yaml
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.measure.telemetry import read_metrics

pytestmark = pytest.mark.e2e

SCRIPT = Path(__file__).parents[1] / "adapters" / "shared_adapter_script.py"
STEPS = 4
GROUPS: dict[str, Any] = {"strategy": "zero2", "shard_within": 2}
# `memory` of each run, and the one from whose checkpoint in the middle it goes on.
RUNS: dict[str, tuple[dict[str, Any], str | None]] = {
    "groups": (GROUPS, None),
    "resumed": (GROUPS, "groups"),
    "then zero2": ({"strategy": "zero2"}, "groups"),
    "then ddp": ({"strategy": "ddp"}, "groups"),
    "ddp": ({"strategy": "ddp"}, None),
    "then groups": (GROUPS, "ddp"),
    "zero3, adapter": (GROUPS | {"strategy": "zero3"}, None),
}
ALONE: dict[str, tuple[dict[str, Any], str | None]] = {"alone": ({}, None), "alone, adapter": ({}, None)}


def run(
    folder: Path, model: Path, prepared: Path, world: int, runs: dict[str, tuple[dict[str, Any], str | None]]
) -> Path:
    """Runs of 4 steps of 8 images in two passes, of which each worker takes its part."""
    files = []
    for name, (memory, before) in runs.items():
        sections: dict[str, Any] = {
            "run": {"dir": str(folder / name), "seed": 5},
            "model": {"path": str(model)},
            "data": {"sources": [{"path": "."}], "prepared": str(prepared), "workers": 0},
            "train": {"steps": STEPS, "batch_size_per_gpu": 4 // world, "global_batch_size": 8, "precision": "fp32"},
            "optimizer": {"lr": 2e-6},  # AdamW makes a step of up to this of a rounded gradient near zero
            "memory": memory,
            "ema": {"averages": [{"name": "ema", "decay": 0.9}]},
            "checkpoint": {"every_steps": STEPS // 2, "keep": 2},
        }
        if before:
            sections["run"]["resume"] = str(checkpoint_dir(folder / before, STEPS // 2))
        if name.endswith("adapter"):
            sections["adapter"] = {"kind": "lora", "rank": 4}
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(to_yaml(Config.model_validate(sections)))
    run_group([[sys.executable, str(SCRIPT), *map(str, files)]] * world, worker_environments(world), folder)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("grouped") / "prepared", {Bucket(64, 64): 16})


@pytest.fixture(scope="module")
def alone(model_folder: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("alone"), model_folder, prepared, 1, ALONE)


@pytest.fixture(scope="module")
def four(model_folder: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("four"), model_folder, prepared, 4, RUNS)


def train_records(run_dir: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run_dir) if record["kind"] == "train"]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "resumed"])
def test_the_steps_of_one_worker(alone: Path, four: Path, name: str) -> None:
    """Losses, norms, weights and their average; also after a change from one way to another."""
    one = alone / ("alone, adapter" if name.endswith("adapter") else "alone")
    records, expected = train_records(four / name), train_records(one)
    assert len(expected) == STEPS and len(records) == (STEPS // 2 if RUNS[name][1] else STEPS)
    for record, like in zip(records, expected[-len(records) :], strict=True):
        assert record["loss"] == pytest.approx(like["loss"], abs=1e-6)
        assert record["grad_norm"] == pytest.approx(like["grad_norm"], rel=1e-5)
    files = [file.relative_to(one) for file in checkpoint_dir(one, STEPS).glob("*/*.safetensors")]
    files = [file for file in files if file.name != "optimizer.safetensors"]
    assert len(files) == 2
    for file in files:
        tensors, like = load_file(four / name / file), load_file(one / file)
        assert tensors.keys() == like.keys()
        assert max(float((tensors[key] - like[key]).abs().max()) for key in like) < 1e-6


def test_an_interrupted_run_ends_with_the_same_bits(four: Path) -> None:
    assert_same_checkpoints(*(checkpoint_dir(four / name, STEPS) for name in ("groups", "resumed")))

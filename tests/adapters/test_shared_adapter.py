"""However workers share an adapter and the weights below it, they take the steps of one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.adapter_config_of import KINDS, adapted
from tests.data.small_set import write_small_set
from tests.train.test_averages import assert_same_checkpoints
from tests.worker_group import run_group, worker_environments
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.load import to_yaml
from trainer.data.buckets import Bucket

SCRIPT = Path(__file__).parent / "shared_adapter_script.py"
STEPS = 4
# Kind, strategy and precision; `resumed`: from the checkpoint of the run before, two steps earlier.
BY_TWO = ("lora:ddp:fp32", "lokr:ddp:fp32", "dora:ddp:fp32", "loha:zero2:fp32", "oft:zero3:fp32")
IN_BF16 = ("dora:ddp:bf16", "dora:zero3:bf16")
BY_FOUR = ("lora:zero3:fp32", "lora:zero3:resumed", "dora:zero2:fp32")
ALONE = tuple(f"{kind}:auto:fp32" for kind in ("lora", "lokr", "dora", "loha", "oft"))


def run(folder: Path, model: Path, prepared: Path, world: int, names: tuple[str, ...]) -> Path:
    """Runs of 4 steps of 4 images, of which each worker takes its part."""
    files = []
    for name in names:
        kind, strategy, precision = name.split(":")
        settings = KINDS[kind] | {"text_encoders": kind == "lora"}
        settings |= {"dropout": 0.2} if kind in ("lora", "dora") else {}
        train = {"steps": STEPS, "batch_size_per_gpu": 4 // world}
        sections: dict[str, Any] = {
            "train": train | {"precision": "fp32" if precision == "resumed" else precision},
            "optimizer": {"lr": 1e-4},
            "memory": {"strategy": strategy},
            "checkpoint": {"every_steps": STEPS // 2, "keep": 2},
            "ema": {"averages": [{"name": "ema", "decay": 0.9}]},
        }
        if precision == "resumed":
            before = checkpoint_dir(folder / name.replace("resumed", "fp32"), STEPS // 2)
            sections["run"] = {"resume": str(before)}
        config = adapted(model, prepared, folder / name, settings, **sections)
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(to_yaml(config))
    run_group([[sys.executable, str(SCRIPT), *map(str, files)]] * world, worker_environments(world), folder)
    return folder


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("shared") / "prepared", {Bucket(64, 64): 8})


@pytest.fixture(scope="module")
def alone(model_folder: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("alone"), model_folder, prepared, 1, ALONE)


@pytest.fixture(scope="module")
def two(model_folder: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("two"), model_folder, prepared, 2, (*BY_TWO, *IN_BF16))


@pytest.fixture(scope="module")
def four(model_folder: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("four"), model_folder, prepared, 4, BY_FOUR)


def losses_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def assert_same_steps(one: Path, other: Path) -> None:
    """The same losses, weights and averages."""
    losses = losses_of(one)
    assert losses_of(other) == pytest.approx(losses, abs=1e-6) and len(losses) == STEPS
    for folder in ("adapter", "adapter_ema"):
        file = f"{folder}/adapter_model.safetensors"
        found, expected = (load_file(checkpoint_dir(run_dir, STEPS) / file) for run_dir in (other, one))
        assert found.keys() == expected.keys()
        assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-6
        ends = ("lora_B.weight", "w2_b", "hada_w2_a", "oft_R.weight")
        assert all(torch.count_nonzero(tensor) for name, tensor in found.items() if name.endswith(ends))


def single(alone: Path, name: str) -> Path:
    return alone / f"{name.split(':')[0]}:auto:fp32"


@pytest.mark.e2e
@pytest.mark.parametrize("name", BY_TWO)
def test_two_workers_take_the_steps_of_one(alone: Path, two: Path, name: str) -> None:
    assert_same_steps(single(alone, name), two / name)


@pytest.mark.e2e
def test_spread_weights_are_computed_with_as_whole_ones_in_bf16(two: Path) -> None:
    """Nothing of the adapter is rounded on the way, for DoRA's magnitudes would change the first loss. Gradients of
    what several layers use are added up in another order, which changes bf16's last digits.
    """
    whole, spread = (losses_of(two / name) for name in IN_BF16)
    assert len(whole) == STEPS and spread[0] == whole[0]
    assert spread == pytest.approx(whole, abs=2e-3)


@pytest.mark.e2e
@pytest.mark.parametrize("name", [name for name in BY_FOUR if "resumed" not in name])
def test_four_workers_take_the_steps_of_one(alone: Path, four: Path, name: str) -> None:
    assert_same_steps(single(alone, name), four / name)


@pytest.mark.e2e
def test_a_spread_run_that_was_interrupted_ends_with_the_same_bits(four: Path) -> None:
    straight, resumed = (checkpoint_dir(four / f"lora:zero3:{way}", STEPS) for way in ("fp32", "resumed"))
    assert_same_checkpoints(straight, resumed)
    assert len(losses_of(four / "lora:zero3:resumed")) == STEPS // 2

"""What a bench finds out about a run's optimizer: its state as planned, its time, and what it leaves."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.train.real_run import ALONE, model_of, run_config
from trainer.config.schema import Config
from trainer.memory.run_plan import memory_plan
from trainer.train.workers.bench_worker import Way, build_way, synthetic_data
from trainer.train.workers.optimizer_worker import seconds_alone, state_bytes_of

pytestmark = pytest.mark.e2e


def way_of(model: Path, folder: Path, kind: str, precision: str, **memory: Any) -> Way:
    config = run_config(model, folder / "prepared", folder / "run", steps=2).model_dump(mode="json", exclude_unset=True)
    config["train"] |= {"precision": precision, "batch_size_per_gpu": 1}
    config["data"] |= {"cache_text": True, "buckets": {"resolution": 64, "min_px": 64, "max_px": 64}}
    config |= {"optimizer": {"kind": kind, "lr": 1e-4}, "memory": memory}
    checked = Config.model_validate(config)
    return build_way(checked, model_of(checked), ALONE, synthetic_data(checked, model_of(checked), False))


@pytest.mark.parametrize(
    ("kind", "precision"),
    [("adamw", "fp32"), ("came", "bf16_kahan"), ("lion_8bit", "bf16_stochastic"), ("prodigy", "fp32")],
)
def test_state_is_as_planned_and_no_gradient_stays(
    model_folder: Path, tmp_path: Path, kind: str, precision: str
) -> None:
    way = way_of(model_folder, tmp_path, kind, precision)
    parameters = way.parts.strategy.parameters
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert seconds_alone(way.parts, 2) > 0
    assert all(parameter.grad is None for parameter in parameters.values())
    assert any(not torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    planned = memory_plan(way.planned, way.setting).optimizer_bytes[kind]
    assert state_bytes_of(way.parts) == pytest.approx(planned, rel=0.01)


def test_released_gradients_come_a_block_at_a_time(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = way_of(model_folder, tmp_path, "lion", "fp32", release_gradients=True)
    parameters, optimizer = way.parts.strategy.parameters, way.parts.optimizer
    held: list[int] = []
    step = optimizer.step

    def watched(**named: Any) -> None:
        held.append(sum(parameter.grad is not None for parameter in parameters.values()))
        step(**named)

    monkeypatch.setattr(optimizer, "step", watched)
    seconds_alone(way.parts, 1)
    assert sum(held) == 2 * len(parameters) and max(held) < len(parameters)

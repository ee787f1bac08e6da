"""The learning rates that a run records: of each part, and what an optimizer finds; stopped runs record the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from tests.data.small_set import write_small_set
from tests.train.real_run import run_config, watched_run
from trainer.config.schema import Config, OptimizerConfig
from trainer.data.buckets import Bucket
from trainer.measure.telemetry import TENSORBOARD_DIR, read_metrics
from trainer.optim.optimizers import make_optimizer, rates_of, scale_lr

FOUND = {
    "prodigy": {"kind": "prodigy", "lr": 1.0, "d0": 1e-4},
    "dadapt_adam": {"kind": "dadapt_adam", "lr": 0.5, "d0": 1e-4, "growth_rate": 1.5},
}


@pytest.fixture
def configured(model_folder: Path, tmp_path: Path) -> Any:
    """A run of some steps with an optimizer."""
    root = write_small_set(tmp_path / "prepared", {Bucket(64, 64): 8})

    def make(run: str, optimizer: dict[str, Any], **more: Any) -> Config:
        config = run_config(model_folder, root, tmp_path / run, steps=6).model_dump(mode="json", exclude_unset=True)
        return Config.model_validate(config | {"checkpoint": {"every": "never"}, "optimizer": optimizer} | more)

    return make


def trained(config: Config) -> list[dict[str, Any]]:
    """The records of the steps, without what depends on the clock."""
    clock = ("time", "step_s", "data_wait_s", "images_per_s")
    steps = [record for record in read_metrics(config.run.dir) if record["kind"] == "train"]
    return [{key: value for key, value in record.items() if key not in clock} for record in steps]


@pytest.mark.e2e
@pytest.mark.parametrize("kind", FOUND)
def test_a_found_rate_is_recorded_and_a_stopped_run_finds_the_same(configured: Any, kind: str) -> None:
    straight, stopped = (configured(run, FOUND[kind]) for run in ("straight", "stopped"))
    watched_run(straight)
    watched_run(stopped, stop_after=3)
    watched_run(stopped)
    records = trained(straight)
    assert records == trained(stopped) and len(records) == 6
    found = [record["d"] for record in records]
    assert found == sorted(found) and found[-1] > 1e-4
    assert all(record["effective_lr"] == record["lr"] * record["d"] for record in records)
    assert "lr/unet" not in records[0]
    events = EventAccumulator(str(straight.run.dir / TENSORBOARD_DIR)).Reload()
    assert [event.value for event in events.Scalars("train/d")] == pytest.approx(found)


@pytest.mark.e2e
def test_each_part_has_its_rate_and_keeps_it_over_a_stop(configured: Any) -> None:
    more = {
        "trainable": {
            "unet": {"lr_scale": {"attn2": 0.5}},
            "text_encoder_1": {"train": True, "lr": 4e-4},
            "text_encoder_2": {"train": True},
        },
        "lr_schedule": {"kind": "cosine", "warmup_steps": 2},
    }
    straight, stopped = (configured(run, {"lr": 1e-3}, **more) for run in ("straight", "stopped"))
    watched_run(straight)
    watched_run(stopped, stop_after=3)
    watched_run(stopped)
    records = trained(straight)
    assert records == trained(stopped) and len(records) == 6
    for record in records:
        assert record["lr/unet"] == record["lr/text_encoder_2"] == record["lr"]
        assert record["lr/text_encoder_1"] == pytest.approx(0.4 * record["lr"])
        assert "d" not in record and "effective_lr" not in record
    assert len({record["lr"] for record in records}) > 3


def test_one_part_of_several_groups_is_one_rate() -> None:
    """The first group's, and nothing found before a kind that finds a rate has taken a step."""
    groups = {name: {f"{name}.w": nn.Parameter(torch.randn(4, 4))} for name in ("unet", "unet lr x0.5")}
    config = OptimizerConfig.model_validate({"kind": "prodigy", "lr": 1.0})
    optimizer = make_optimizer(groups, config, peak_lrs={"unet": 1.0, "unet lr x0.5": 0.5})
    scale_lr(optimizer, 0.5)
    assert rates_of(optimizer) == (0.5, {"unet": 0.5}, None)
    for named in groups.values():
        for parameter in named.values():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    found = rates_of(optimizer).found
    assert found is not None and found >= 1e-6
    assert rates_of(make_optimizer(groups, OptimizerConfig.model_validate({"lr": 1.0}))).found is None

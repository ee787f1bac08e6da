"""What an objective has learnt goes on over an interruption, to the bit; another objective is told, or refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.small_set import write_small_set
from tests.train.real_run import run_config, watched_run
from trainer.checkpoint.run_dir import checkpoint_dir, newest_checkpoint, read_state
from trainer.config.schema import Config
from trainer.config.sections.objective_config import ObjectiveConfig
from trainer.data.buckets import Bucket
from trainer.diffusion import importance
from trainer.errors import UserError

pytestmark = pytest.mark.e2e

STEPS = 6
LEARNT: dict[str, dict[str, Any]] = {
    "importance": {"timesteps": {"distribution": "importance", "stratified": True}},
    "learned": {"prediction": "v_prediction", "weighting": {"kind": "learned", "lr": 0.1}},
    "companions": {"prediction": "flow", "loss": {"contrast": 0.05}, "noise": {"pairing": "optimal_transport"}},
}


@pytest.fixture
def configured(model_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    root = write_small_set(tmp_path / "prepared", {Bucket(64, 64): 9, Bucket(64, 128): 6})

    def make(run: str, objective: dict[str, Any], steps: int = STEPS) -> Config:
        config = run_config(model_folder, root, tmp_path / run, steps=steps)
        return config.model_copy(update={"objective": ObjectiveConfig.model_validate(objective)})

    return make


@pytest.mark.parametrize("name", LEARNT)
def test_an_interrupted_run_ends_with_the_same_bits(
    name: str, configured: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "_ENOUGH", 0)  # else these few steps would still be even
    whole, parted = configured("whole", LEARNT[name]), configured("parted", LEARNT[name])
    expected = watched_run(whole)
    first, second = watched_run(parted, stop_after=3), watched_run(parted)
    assert [r.loss for r in first.results + second.results] == [r.loss for r in expected.results]
    ends = [checkpoint_dir(config.run.dir, STEPS) for config in (whole, parted)]
    weights = [(end / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() for end in ends]
    assert weights[0] == weights[1]
    states = [read_state(end)["objective"] for end in ends]
    assert states[0] == states[1]
    plain = watched_run(configured("plain", {k: v for k, v in LEARNT[name].items() if k == "prediction"}))
    assert [r.loss for r in plain.results][1:] != [r.loss for r in expected.results][1:]


def test_another_objective_is_told_or_refused(
    configured: Callable[..., Config], caplog: pytest.LogCaptureFixture
) -> None:
    watched_run(configured("run", {"weighting": {"kind": "min_snr"}}, steps=1))
    with caplog.at_level(logging.WARNING):
        watched_run(configured("run", LEARNT["importance"], steps=2))
    assert "objective.weighting: from here on None; before, it was {'kind': 'min_snr'}" in caplog.text
    assert "loss_history: begins here" in caplog.text
    before = newest_checkpoint(configured("run", {}).run.dir, print)
    with pytest.raises(
        UserError, match=r"has trained epsilon up to .* would train v_prediction .* run\.dir of its own"
    ):
        watched_run(configured("run", LEARNT["learned"], steps=3))
    assert newest_checkpoint(configured("run", {}).run.dir, print) == before

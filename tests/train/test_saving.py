"""Checkpoints of a real run: by time, for good, on another disk, and what a save costs the steps."""

import json
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.small_set import write_small_set
from tests.train.real_run import run_config, watched_run
from trainer.checkpoint.manifest import MANIFEST, find_damage
from trainer.checkpoint.run_dir import checkpoint_dir, checkpoint_step, fallback_run_dir, list_checkpoints
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.errors import UserError
from trainer.train.step import StepParts

pytestmark = pytest.mark.e2e


@pytest.fixture
def configured(model_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """A run of a few steps, with a section `checkpoint`."""
    root = write_small_set(tmp_path / "prepared", {Bucket(64, 64): 8})

    def make(steps: int, run: str = "run", **checkpoint: Any) -> Config:
        config = run_config(model_folder, root, tmp_path / run, steps=steps).model_dump(mode="json", exclude_unset=True)
        return Config.model_validate(config | {"checkpoint": checkpoint})

    return make


def manifest(run_dir: Path, step: int) -> dict[str, Any]:
    """All but the state, whose rounded seconds may differ."""
    files = json.loads((checkpoint_dir(run_dir, step) / MANIFEST).read_text())["files"]
    return {name: entry for name, entry in files.items() if name.endswith(".safetensors")}


def test_by_time_while_training_goes_on(
    configured: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        watched_run(configured(12, every="0.5s", keep=12), before_step=lambda step: time.sleep(0.1))
    found = [checkpoint_step(path) for path in list_checkpoints(tmp_path / "run")]
    assert 3 <= len(found) <= 12 and found[-1] == 12
    assert all(find_damage(path) is None for path in list_checkpoints(tmp_path / "run"))
    assert re.search(r"saved .*step-0000000\d in \d+\.\d s, for which training waited 0\.\d\d s", caplog.text)
    # What was written beside the steps after it is what a run has that ends there.
    first = found[0]
    watched_run(configured(first, "straight", every="never"))
    assert manifest(tmp_path / "run", first) == manifest(tmp_path / "straight", first)
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path / "straight")] == [first]


def test_those_of_some_steps_stay(configured: Callable[..., Config], tmp_path: Path) -> None:
    watched_run(configured(9, every="never", every_steps=2, keep=2, keep_every_steps=3))
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path / "run")] == [3, 6, 8, 9]


def test_another_disk_stands_in(
    configured: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The run's own is gone at steps 2 to 4 and when the run is stopped; it is back at step 8."""
    run_dir, other = tmp_path / "run", tmp_path / "other"
    gone = run_dir / "checkpoints"
    run_dir.mkdir()
    gone.write_text("a file where the disk was")
    stand_in = fallback_run_dir(other, run_dir)
    config = configured(10, every="never", every_steps=2, fallback_dir=str(other))
    watched_run(config, stop_after=5)
    assert [checkpoint_step(path) for path in list_checkpoints(stand_in)][-1] == 5
    assert f"not written (Not a directory); trying again in {other}" in caplog.text
    gone.unlink()
    watched = watched_run(config)
    assert len(watched.results) == 5, "the run went on from the stand-in"
    assert "step-00000005: the newest checkpoint, written there because" in caplog.text
    assert [checkpoint_step(path) for path in list_checkpoints(run_dir)] == [6, 8, 10]
    assert list_checkpoints(stand_in) == []
    watched_run(configured(10, "straight", every="never"))
    assert manifest(run_dir, 10) == manifest(tmp_path / "straight", 10)


def test_only_at_the_end_it_is_an_error(
    configured: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    with pytest.raises(UserError, match=r"step-00000003: the checkpoint could not be written: Not a directory"):
        watched_run(configured(3, every="never", every_steps=1))
    assert "step-00000001: not written (Not a directory); training goes on" in caplog.text


@pytest.mark.parametrize("kind", ["disk_full", "disk_gone"])
def test_a_disk_that_fails_once_costs_one_checkpoint(
    configured: Callable[..., Config],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setenv("FAULT", f"{kind}@0:4")
    watched_run(configured(8, every="never", every_steps=2, keep=9))
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path / "run")] == [2, 6, 8]
    said = "No space left on device" if kind == "disk_full" else "Input/output error"
    assert f"step-00000004: not written ({said}); training goes on, the next one is tried as usual" in caplog.text
    assert not [path for path in (tmp_path / "run" / "checkpoints").iterdir() if path.suffix == ".tmp"]


def test_what_is_not_finite_is_not_tried_on_another_disk(
    configured: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another folder would refuse it as well, and stay in place of the run's own."""

    @torch.no_grad()
    def poison(step: int, parts: StepParts) -> None:
        if step == 2:
            next(parts.denoiser.unet.parameters()).view(-1)[0] = float("nan")

    config = configured(4, every="never", every_steps=3, fallback_dir=str(tmp_path / "other"))
    with pytest.raises(
        UserError, match=r"step-00000004: the checkpoint could not be written: .* holds NaN or infinity"
    ):
        watched_run(config, before_parts=poison)
    assert re.search(r"step-00000003: not written \(.* holds NaN or infinity\); training goes on", caplog.text)
    assert not (tmp_path / "other").exists()

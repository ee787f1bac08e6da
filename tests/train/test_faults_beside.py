"""Another base model, samples and validation that fail: each is refused or told, and costs no step."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.data.small_set import write_small_set
from tests.train.real_run import run_config, watched_run
from trainer.checkpoint.run_dir import checkpoint_dir, list_checkpoints
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.errors import UserError
from trainer.evaluate import scoring

pytestmark = pytest.mark.e2e


@pytest.fixture
def configured(model_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """A run of a few steps; sections are changed by keyword."""
    root = write_small_set(tmp_path / "prepared", {Bucket(64, 64): 8})

    def make(steps: int, model: Path = model_folder, **sections: dict[str, Any]) -> Config:
        fields = run_config(model, root, tmp_path / "run", steps=steps).model_dump(mode="json", exclude_unset=True)
        for section, values in sections.items():
            fields[section] = fields.get(section, {}) | values
        return Config.model_validate(fields)

    return make


def other_model(model_folder: Path, to: Path) -> Path:
    """The same but for the second text encoder's weights."""
    shutil.copytree(model_folder, to)
    file = to / "text_encoder_2" / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    return to


def test_a_run_does_not_go_on_beside_other_frozen_weights(
    configured: Callable[..., Config], model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched_run(configured(1))
    other = other_model(model_folder, tmp_path / "other")
    with pytest.raises(
        UserError, match=r"other: its text_encoder_2 is not what .*step-00000001 was trained with; give"
    ):
        watched_run(configured(2, other))
    wish = {"resume": str(checkpoint_dir(tmp_path / "run", 1)), "dir": str(tmp_path / "new")}
    with caplog.at_level(logging.WARNING):
        watched_run(configured(2, other, run=wish))
    assert "its text_encoder_2 is not what" in caplog.text
    assert [path.name for path in list_checkpoints(tmp_path / "new")] == ["step-00000002"]


def test_samples_that_cannot_be_drawn_are_a_warning(
    configured: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").touch()  # a file where the folder should be
    samples = {"every_steps": 1, "prompts": ["a cat"], "steps": 1}
    with caplog.at_level(logging.WARNING):
        run = watched_run(configured(2, samples=samples))
    assert len(run.results) == 2 and len(list_checkpoints(tmp_path / "run")) == 1
    told = [record.getMessage() for record in caplog.records if "samples (" in record.getMessage()]
    assert len(told) == 2 and told[0].startswith("step 1: no samples (NotADirectoryError: ")
    assert told[1].endswith("), 2 times by now; training goes on, the next are tried as usual")


def test_a_validation_that_fails_is_a_warning(
    configured: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanished(*_: object) -> torch.Tensor:
        raise OSError(5, "Input/output error", "validation-0.safetensors")

    monkeypatch.setattr(scoring, "validation_batches", vanished)
    with caplog.at_level(logging.WARNING):
        run = watched_run(configured(2, validation={"every_steps": 1}))
    assert len(run.results) == 2
    assert "step 1: no validation (" in caplog.text and "Input/output error" in caplog.text

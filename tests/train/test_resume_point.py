"""Where a run goes on from: by `run.resume`, and after a restart for memory."""

import os
from pathlib import Path

import pytest
import torch

from tests.train.real_run import ALONE
from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.run_dir import RESOLVED_CONFIG, checkpoint_dir
from trainer.checkpoint.saver import Folder, save_now
from trainer.checkpoint.write import OPTIMIZER, TensorFile
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.parallel.local_shard import held
from trainer.train.saved.find_resume import find_resume_point

COMMAND_STARTED = 1_000_000_000  # seconds since 1970


def save(run_dir: Path, step: int, written: int) -> Path:
    path = checkpoint_dir(run_dir, step)
    file = TensorFile(OPTIMIZER, {"step": held(torch.tensor(float(step)))}, {})
    save_now(Folder(path, [file], {"step": step}))
    os.utime(path / MANIFEST, (written, written))
    return path


def found(run_dir: Path, resume: bool | str) -> Path | None:
    config = Config.model_validate(
        {
            "run": {"dir": str(run_dir), "resume": resume},
            "model": {"path": "model"},
            "data": {"sources": [{"path": "images"}], "prepared": "prepared"},
            "train": {"steps": 10},
            "optimizer": {"lr": 1e-6},
        }
    )
    return find_resume_point(config, ALONE)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Of a command that was started after step 5 of an earlier one."""
    folder = tmp_path / "run"
    save(folder, 5, COMMAND_STARTED - 10)
    (folder / RESOLVED_CONFIG).touch()
    os.utime(folder / RESOLVED_CONFIG, (COMMAND_STARTED, COMMAND_STARTED))
    return folder


def test_by_the_configuration(run_dir: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", 3, COMMAND_STARTED - 20)
    newest = checkpoint_dir(run_dir, 5)
    assert [found(run_dir, wish) for wish in ("auto", True, False, str(other))] == [newest, newest, None, other]
    (other / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"run.resume = .*step-00000003: "):
        found(run_dir, str(other))


@pytest.mark.parametrize("resume", ["auto", True, False, "other"])
def test_a_restart_for_memory_takes_what_its_own_command_wrote(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: bool | str
) -> None:
    """Before there is such a checkpoint it does as the first attempt did, whatever else lies in the folder."""
    other = save(tmp_path / "other", 3, COMMAND_STARTED - 20)
    wish = str(other) if resume == "other" else resume
    before = found(run_dir, wish)
    monkeypatch.setenv("SDXL_TRAIN_MEMORY_ATTEMPT", "1")
    assert found(run_dir, wish) == before
    for step in (4, 6):  # an earlier command's step 5 lies between
        own = save(run_dir, step, COMMAND_STARTED + step)
        assert found(run_dir, wish) == own

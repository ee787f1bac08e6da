"""Files that a run publishes by itself, and what happens when they cannot be written."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.data.small_set import write_small_set
from tests.train.real_run import run_config, watched_run
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.errors import UserError
from trainer.model_files.header import read_header

pytestmark = pytest.mark.e2e

RIGHT = Path(__file__).parent.parent / "config" / "right.yaml"


def config_of(model: Path, tmp_path: Path, steps: int, **export: object) -> Config:
    root = tmp_path / "prepared"
    if not root.exists():
        write_small_set(root, {Bucket(64, 64): 8})
    config = run_config(model, root, tmp_path / "run", steps=steps)
    checkpoint = config.checkpoint.model_validate({"every_steps": 2, "keep": 2, "export": export})
    return config.model_copy(update={"checkpoint": checkpoint})


def test_files_beside_checkpoints(model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    config = config_of(model_folder, tmp_path, 6, when="checkpoints", dtype="fp32", keep=1, author="someone")
    watched_run(config)
    exports = tmp_path / "run" / "exports"
    # Whether those of steps 2 and 4 were written hangs on how fast this machine is; the last one always is.
    assert [path.name for path in exports.iterdir()] == ["run-step-00000006.safetensors"]
    found = load_file(exports / "run-step-00000006.safetensors")
    weights = checkpoint_dir(tmp_path / "run", 6) / "unet" / "diffusion_pytorch_model.safetensors"
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert torch.equal(found[name], load_file(weights)["conv_in.weight"])
    metadata = read_header(exports / "run-step-00000006.safetensors").metadata
    assert metadata["modelspec.author"] == "someone" and metadata["sdxl_train.step"] == "6"
    assert "exported" in caplog.text


def test_a_stopped_run_exports_nothing_and_goes_on(model_folder: Path, tmp_path: Path) -> None:
    config = config_of(model_folder, tmp_path, 3, when="end", dir=str(tmp_path / "out"))
    watched_run(config, stop_after=1)
    assert not (tmp_path / "out").exists()
    watched_run(config)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run-step-00000003.safetensors"]


def test_what_cannot_be_exported_does_not_end_the_run(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(model_folder, tmp_path, 4, when="checkpoints")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "exports").write_text("in the way")
    watched = watched_run(config)
    assert watched.state is not None and watched.state.step == 4
    assert "not exported, training is not affected" in caplog.text
    assert (tmp_path / "run" / "exports").read_text() == "in the way"


def test_options_that_do_nothing_are_refused() -> None:
    with pytest.raises(UserError, match=r"checkpoint\.export\.dtype = bf16 with .*: has no effect; use `when: end`"):
        load_config(RIGHT, ["checkpoint.export.dtype=bf16"], check_paths=False)
    with pytest.raises(UserError, match=r"checkpoint\.export\.keep.*one file is written"):
        load_config(RIGHT, ["checkpoint.export.when=end", "checkpoint.export.keep=2"], check_paths=False)

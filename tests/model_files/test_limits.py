"""The limits of a configuration reach whoever reads a model's files: a higher one lets pass what a lower refuses."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.model_files.single_files import write_single_file
from trainer.cli.arguments import read_run
from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS
from trainer.model_files.examine.check import check_model
from trainer.model_files.run_model import open_model


@pytest.mark.parametrize(
    ("limit", "most", "rule"),
    [
        ("header_bytes", 500, "more than the 500 that are read"),
        ("config_bytes", 200, "at most 200 are read"),
        ("tokenizer_bytes", 1000, "at most 1,000 are read"),
        ("vocabulary", 500, "a vocabulary of 518 words; the text encoder has 500"),
        ("json_depth", 1, "nested more than 1 levels deep"),
    ],
)
def test_a_folder_within_limits(limit: str, most: int, rule: str, model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    config = tmp_path / "run.yaml"
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(model_folder)},
        "data": {"sources": [{"type": "folder", "path": str(tmp_path / "images")}], "prepared": str(tmp_path / "p")},
        "train": {"steps": 1},
        "optimizer": {"lr": 1e-6},
        "limits": {limit: most},
    }
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match=rule):
        read_run(config, [])
    read_run(config, [f"limits.{limit}={getattr(DEFAULT_LIMITS, limit)}"])


def test_what_the_workers_open_has_the_same_limits(model_folder: Path, tmp_path: Path) -> None:
    """A configuration of more than a megabyte is read by all who want it, or by none."""
    model = Path(shutil.copytree(model_folder, tmp_path / "model"))
    file = model / "unet" / "config.json"
    file.write_text(" " * (DEFAULT_LIMITS.config_bytes + 1) + file.read_text())
    for refused in (lambda: check_model(model), lambda: open_model(model).config("unet")):
        with pytest.raises(UserError, match="at most 1,048,576 are read"):
            refused()
    more = replace(DEFAULT_LIMITS, config_bytes=DEFAULT_LIMITS.config_bytes * 2)
    for opened in (check_model(model, limits=more), open_model(model, limits=more)):
        assert opened.config("unet") and opened.part("unet").tensors
        assert opened.fingerprint("unet") and opened.count_weights("unet")


def test_a_single_file_within_limits(model_folder: Path, tmp_path: Path) -> None:
    file = write_single_file(model_folder, tmp_path / "small.safetensors")
    few = replace(DEFAULT_LIMITS, header_bytes=1000)
    with pytest.raises(UserError, match="more than the 1,000 that are read"):
        check_model(file, tokenizer=model_folder, limits=few)
    with pytest.raises(UserError, match="more than the 1,000 that are read"):
        open_model(file, limits=few).part("unet")

"""Versions of transformers: which ones are refused, by the installed package's metadata alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.model.text import load_tokenizers
from trainer.model_files.tokenizer_files import require_whole_captions


def installed(folder: Path, version: str) -> Path:
    """A place for packages in which pip has left this version of transformers, by its metadata."""
    metadata = folder / f"transformers-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {version}\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("version", ["4.57.3", "5.9.0", "5.19.2"])
def test_transformers_that_cut_captions_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path, version))
    with pytest.raises(UserError, match=f"transformers {version}: cuts captions of more than 75 tokens"):
        load_tokenizers(tmp_path)


@pytest.mark.parametrize("version", ["5.20.0", "5.23.0.dev0", "6.0"])
def test_others_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.syspath_prepend(installed(tmp_path, version))
    require_whole_captions()


def test_a_command_ends_with_one_line_and_without_torch(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(installed(tmp_path, "5.19.0")), str(Path.cwd())))}
    code = "import sys; from trainer.cli.main import main; code = main(sys.argv[1:]); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", code, "plan", "configs/tiny.yaml"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "sdxl-train: transformers 5.19.0: cuts captions of more than 75 tokens without an error; "
        "run `pip install 'transformers>=5.20'`\n"
    )

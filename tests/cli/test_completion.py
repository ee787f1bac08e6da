"""Completion as a real bash does it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.cli.commands.completion import configuration_keys
from trainer.cli.main import COMMANDS


def script(shell: str) -> str:
    command = [sys.executable, "-m", "trainer", "completion", shell]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def completed(folder: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words."""
    (folder / "completion.sh").write_text(script("bash"))
    line = " ".join(f"'{word}'" for word in words)
    code = f"""
        compopt() {{ :; }}
        source completion.sh
        COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}
        _sdxl_train
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", code], check=True, capture_output=True, text=True, cwd=folder)
    return done.stdout.split()


def test_keys_are_those_of_the_configuration() -> None:
    keys = configuration_keys()
    assert len(keys) == len(set(keys)) > 150
    assert {"optimizer.lr", "data.buckets.resolution", "trainable.text_encoder_1.lr"} <= set(keys)
    assert "optimizer" not in keys


def test_bash_completes_commands_files_keys_and_options(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "mine.txt").touch()
    (tmp_path / "models").mkdir()
    assert completed(tmp_path, "sdxl-train", "pl") == ["plan"]
    assert set(completed(tmp_path, "sdxl-train", "m")) == {"merge", "make-tiny", "mine.yaml", "models/"}
    assert completed(tmp_path, "sdxl-train", "mine.yaml", "lr_schedule.warm") == ["lr_schedule.warmup_steps="]
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    (bin_dir / "sdxl-train").write_text(f'#!/bin/sh\nexec {sys.executable} -m trainer "$@"\n')
    (bin_dir / "sdxl-train").chmod(0o755)
    assert completed(tmp_path, str(bin_dir / "sdxl-train"), "export", "--out") == ["--out"]
    assert "--help" in completed(tmp_path, str(bin_dir / "sdxl-train"), "export", "--h")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_of_their_shells_language(shell: str) -> None:
    text = script(shell)
    assert all(name in text for name in COMMANDS) and "optimizer.lr" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, check=True, text=True, capture_output=True)

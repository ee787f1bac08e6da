"""Writes configurations and collects the lines that loading them gives."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.errors import UserError

RIGHT = Path(__file__).with_name("right.yaml").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the folders that `RIGHT` needs."""
    monkeypatch.chdir(tmp_path)
    for name in ("sdxl", "photos", "more"):
        Path(name).mkdir()
    return tmp_path


@pytest.fixture
def load(folder: Path) -> Callable[..., Config]:
    """Loads a configuration given as text or bytes."""

    def load_text(text: str | bytes = RIGHT, overrides: Sequence[str] = ()) -> Config:
        path = Path("c.yaml")
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_config(path, overrides)

    return load_text


@pytest.fixture
def mistakes(load: Callable[..., Config]) -> Callable[..., tuple[str, ...]]:
    """The lines that a wrong configuration gives."""

    def lines_of(text: str | bytes = RIGHT, overrides: Sequence[str] = ()) -> tuple[str, ...]:
        with pytest.raises(UserError) as caught:
            load(text, overrides)
        assert all(line.isprintable() for line in caught.value.lines)
        return caught.value.lines

    return lines_of

"""The end of an import: what would do nothing is left out, what is wrong is told, and the file is written."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.config.rules import broken_rules
from trainer.config.schema import Config
from trainer.config.yaml_source import dump
from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, read_bytes
from trainer.importing.given import Draft

_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?|%[A-Za-z_]\w*%")
_WINDOWS_PATH = re.compile(r"[A-Za-z]:[\\/]")
_IDLE = ("has no effect", "has next to no effect", "must be left out", "is no average")
# Of two that both have an effect, the first is left out, which is told.
_CLASHES = ("must not go together", "the last timestep, which zero terminal SNR is for")
_ORDER = (
    "run", "launch", "model", "data", "captions", "trainable", "adapter", "new_tokens", "train", "objective",
    "optimizer", "lr_schedule", "ema", "checkpoint", "validation", "samples", "memory", "log",
)  # fmt: skip


def settled(draft: Draft) -> Draft:
    """The draft with every option accounted for, and nothing in it that the rules of a configuration refuse.

    Raises:
        UserError: what came out is no configuration, with what has to be mended first.
    """
    _drop_what_does_nothing(draft)
    draft.finish()
    for option, value in draft.given.items():
        if isinstance(value, str) and (found := _VARIABLE.search(value)):
            draft.notes.insert(
                0, f"{draft.mark}{option} {value}: {found[0]} is set nowhere in the script; put in what it stands for"
            )
    draft.sections = {name: draft.sections[name] for name in _ORDER if name in draft.sections}
    if places := [key for key, text in _texts(draft.sections) if _WINDOWS_PATH.match(text)]:
        draft.notes.insert(0, f"{', '.join(places)}: paths of Windows; put in where these lie on this machine")
    return draft


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Each text of nested sections, with its key."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        for name, each in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(each, f"{key}.{name}" if key else str(name))


def read_text(path: Path) -> str:
    """A small text file from outside, in UTF-8, or in UTF-16 as PowerShell writes it.

    Raises:
        UserError: it cannot be read, or is none.
    """
    try:
        data = read_bytes(path, DEFAULT_LIMITS.config_bytes)
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is no text in UTF-8") from None


def found_beside(name: str, folder: Path) -> Path:
    """A file that a command names: from here, or else in the folder of the command's own file.

    What cannot be the name of a file is returned as it stands: whoever reads it says so.
    """
    try:
        path = Path(name).expanduser()
        return path if path.exists() or not (folder / path).exists() else folder / path
    except (OSError, RuntimeError):  # too long, or the home of nobody
        return Path(name)


def as_yaml(draft: Draft, told: str) -> str:
    """The file: how to use it, what to know, and the keys."""
    lines = [f"# Imported from {told}.", "#", "#   sdxl-train plan THIS_FILE", "#   sdxl-train THIS_FILE"]
    for note in draft.notes:
        lines += ["#", *_wrapped(f"- {note}")]
    return "\n".join(lines) + "\n\n" + dump(draft.sections)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="# ", subsequent_indent="#   ")


def _drop_what_does_nothing(draft: Draft) -> None:
    """Options that kohya's scripts take without a word though they do nothing; here they would be refused.

    Raises:
        UserError: what came out is no configuration, with what has to be mended first.
    """
    for _ in range(40):
        try:
            config = Config.model_validate(draft.sections)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise UserError(f"{_options_of(draft, key)}: {key}: {first['msg']}") from None
        problems = broken_rules(config)
        if not problems:
            return
        problem = problems[0]
        rule = next((rule for rule in (*_IDLE, *_CLASHES) if rule in problem.text), None)
        idle = next((key for key in problem.keys if rule and _remove(draft, key)), None)
        if idle is None or rule is None:
            raise UserError(f"{_options_of(draft, '.'.join(map(str, problem.keys[0])))}: {problem.text}")
        name = ".".join(map(str, idle))
        if rule in _CLASHES:
            draft.notes.insert(0, f"{_options_of(draft, name)}: {problem.text}. {name} is left out")
        for option, text in draft.became.items():
            if name in text:
                draft.became[option] = f"- {problem.text[problem.text.rindex(rule) :]}"


def _options_of(draft: Draft, key: str) -> str:
    found = [f"{draft.mark}{option}" for option, text in draft.became.items() if key in text]
    return ", ".join(found) or "the command"


def _remove(draft: Draft, key: Sequence[str | int]) -> bool:
    """Whether the key was there."""
    at: Any = draft.sections
    for part in key[:-1]:
        at = at[part] if isinstance(at, list) and isinstance(part, int) else isinstance(at, dict) and at.get(part)
    if not isinstance(at, dict) or key[-1] not in at:
        return False
    at.pop(key[-1])
    return True

"""What was left out of a prepared set and why, from the lists that lie in its folder."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trainer.data.catalog.reasons import without_numbers
from trainer.data.prepare.working_folder import LEFT_OUT
from trainer.data.survey.stats import BAD_FILE
from trainer.errors import UserError
from trainer.guards import open_regular, printable

MOST_REASONS = 200
_EXAMPLES = 3
_MOST_LINE_BYTES = 1 << 20
_OTHERS = "(other reasons)"
_UNREADABLE = "(a line that cannot be read)"


@dataclass(frozen=True)
class LeftOut:
    """One reason of one list; numbers within reasons are not told apart."""

    file: str
    reason: str
    images: int
    examples: tuple[str, ...]
    """Keys of a few, or paths where there is no key."""


def left_out_by_reason(prepared: Path) -> list[LeftOut]:
    """The reasons of both lists, most images first; the lists may have millions of lines, of which none stays."""
    found = []
    for name in (BAD_FILE, LEFT_OUT):
        images: Counter[str] = Counter()
        examples: dict[str, list[str]] = {}
        for reason, example in _entries(prepared / name):
            kept = reason if reason in images or len(images) < MOST_REASONS else _OTHERS
            images[kept] += 1
            if example and len(examples.setdefault(kept, [])) < _EXAMPLES:
                examples[kept].append(example)
        found += [LeftOut(name, reason, n, tuple(examples.get(reason, ()))) for reason, n in images.items()]
    return sorted(found, key=lambda part: (-part.images, part.file, part.reason))


def _entries(path: Path) -> Iterator[tuple[str, str]]:
    """Reason and example of each line."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        yield from map(_entry, _lines(file))


def _entry(line: bytes) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        return without_numbers(printable(entry["reason"])), printable(str(entry.get("key") or entry.get("path") or ""))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return _UNREADABLE, ""


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines, of which one that is too long is given cut off, once."""
    while line := file.readline(_MOST_LINE_BYTES):
        yield line
        while not line.endswith(b"\n") and len(line) == _MOST_LINE_BYTES:
            line = file.readline(_MOST_LINE_BYTES)

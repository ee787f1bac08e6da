"""Why images cannot be used, counted by kind: reasons that differ in numbers and names alone are one."""

import re
from collections import Counter

from trainer.errors import printable

_SHOWN = 3
_MOST_KINDS = 1000
_MOST_CHARS = 120
_NUMBER = re.compile(r"(?<![A-Za-z]{2})\d[\d,.]*")
_NAMES = re.compile(r"'[^']*'|\"[^\"]*\"|[^\s;:,()]*/[^\s;:,()]*")
_OTHERS = "another reason"


def without_numbers(reason: str) -> str:
    """The reason with `N` for each number in it."""
    return _NUMBER.sub("N", reason)


def kind_of(reason: str) -> str:
    """The reason without numbers, and with `...` for what is quoted and for paths."""
    return without_numbers(_NAMES.sub("...", reason))


class Reasons:
    """How many images there are of each kind of reason, with the first one's path; of any number of images."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    @property
    def total(self) -> int:
        """All images that were added."""
        return self._counts.total()

    def add(self, path: str, reason: str) -> None:
        """Count an image."""
        kind = kind_of(reason)
        if kind not in self._first and len(self._first) >= _MOST_KINDS:
            kind = _OTHERS
        self._counts[kind] += 1
        self._first.setdefault(kind, path)

    def describe(self) -> str:
        """The commonest: `9 x cannot be decoded (such as a/b.jpg), 3 x is empty (such as c.jpg)`."""
        return ", ".join(
            f"{number:,} x {_shortened(kind)} (such as {printable(self._first[kind])})"
            for kind, number in self._counts.most_common(_SHOWN)
        )


def _shortened(kind: str) -> str:
    return kind if len(kind) <= _MOST_CHARS else kind[: _MOST_CHARS - 3] + "..."

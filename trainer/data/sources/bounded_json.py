"""A JSON file of any size, read as a stream by a parser that has no limits of its own: its limits are kept here.

The bytes are looked through on their way to the parser, which then sees no level, text or entry beyond them.
"""

from itertools import accumulate
from typing import BinaryIO

from trainer.guards import Limits, Refused

_OTHERS = bytes(byte for byte in range(256) if byte not in b'[]{}"')
_ENTRY_LEVEL = 1
_ENTRY_PARTS = 4
_STEPS = [0] * 256
for _opens, _closes in (b"[]", b"{}"):
    _STEPS[_opens], _STEPS[_closes] = 1, -1


class BoundedJson:
    """Reads from a binary file as `file.read(n)` does.

    Args:
        said: how the file is called in messages.

    Raises:
        Refused: on `read`: nested deeper than `limits.json_depth`; a text, number or blank longer than
            `limits.caption_bytes`; an entry of the outermost object four times as long. To a few reads' length exactly.
    """

    def __init__(self, file: BinaryIO, said: str, limits: Limits) -> None:
        self._file, self._said, self._limits = file, said, limits
        self._depth = self._piece_bytes = self._entry_bytes = self._at = 0
        self._in_text = False
        self._cut_escape = b""

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes."""
        some = self._file.read(size)
        if some:
            self._look_through(some)
            self._at += len(some)
        return some

    def _look_through(self, some: bytes) -> None:
        text = self._cut_escape + some if self._cut_escape else some
        self._cut_escape = b""
        if b"\\" in text:
            text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
            if text.endswith(b"\\"):
                text, self._cut_escape = text[:-1], b"\\"
        marks = text.translate(None, _OTHERS)
        parts = marks.split(b'"')
        outside = b"".join(parts[self._in_text :: 2])
        self._in_text ^= not len(parts) % 2
        self._piece_bytes = 0 if outside or len(parts) > 1 else self._piece_bytes + len(some)
        if self._piece_bytes > self._limits.caption_bytes:
            raise self._refused(f"a text or number of more than {self._limits.caption_bytes:,} bytes")
        least = most = self._depth
        if outside:
            depths = list(accumulate(map(_STEPS.__getitem__, outside), initial=self._depth))
            least, most, self._depth = min(depths), max(depths), depths[-1]
        if most > self._limits.json_depth:
            raise self._refused(f"more than {self._limits.json_depth} levels inside one another")
        self._entry_bytes = 0 if least <= _ENTRY_LEVEL else self._entry_bytes + len(some)
        if self._entry_bytes > _ENTRY_PARTS * self._limits.caption_bytes:
            raise self._refused(f"an entry of more than {_ENTRY_PARTS * self._limits.caption_bytes:,} bytes")

    def _refused(self, what: str) -> Refused:
        return Refused(f"{self._said}: holds {what}, near byte {self._at:,}")

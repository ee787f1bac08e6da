"""A text file that grows, read from where it was left; it may also be replaced, cut off, or not be there."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from trainer.errors import printable
from trainer.guards import Refused, open_regular

_BLOCK = 1 << 20
_LONGEST = 1 << 20  # bytes of a line; a longer one is none of ours
_REMEMBERED = 256  # bytes before the place that was reached, by which the file is known again


class FollowedFile:
    """Lines that were not read yet, of a file which others write."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._identity: tuple[int, int] = (0, 0)
        self._reached = 0
        self._before = b""

    def news(self) -> tuple[bool, Iterator[str]]:
        """Whether the file has to be read anew, so that all earlier lines count no more; and the lines that are new.

        A line counts when it is whole. Take all of them: what was taken is not given again.

        Raises:
            OSError: there is no such file; what comes in its place is read anew.
            Refused: it is no regular one.
        """
        try:
            file = open_regular(self.path)
        except (OSError, Refused):
            self._identity, self._reached, self._before = (0, 0), 0, b""
            raise
        found = os.fstat(file.fileno())
        identity = (found.st_dev, found.st_ino)
        goes_on = identity == self._identity and found.st_size >= self._reached and self._knows(file)
        is_anew = not goes_on
        if is_anew:
            self._identity, self._reached, self._before = identity, 0, b""
        return is_anew, self._lines(file)

    def _knows(self, file: BinaryIO) -> bool:
        """A file that was cut off, and has grown past this place since, has other bytes before it."""
        return os.pread(file.fileno(), len(self._before), self._reached - len(self._before)) == self._before

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        with file:
            file.seek(self._reached)
            rest = b""
            while block := file.read(_BLOCK):
                whole, newline, rest = (rest + block).rpartition(b"\n")
                if newline:
                    self._reached += len(whole) + 1
                    self._before = (self._before + whole[-_REMEMBERED:] + newline)[-_REMEMBERED:]
                    yield from whole.decode("utf-8", "replace").split("\n")
                elif len(rest) > _LONGEST:
                    self._reached += len(rest)
                    self._before, rest = rest[-_REMEMBERED:], b""


class FollowedList:
    """A file of lines, of which the newest are shown and all are counted.

    Attributes:
        count: of its lines, empty ones left out.
        newest: at most so many as were asked for.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._file = FollowedFile(path)
        self.count, self.newest = 0, deque[str](maxlen=most)

    def update(self) -> None:
        """Take up what was written since; a file that is not there has no lines."""
        try:
            is_anew, lines = self._file.news()
        except (OSError, Refused):
            is_anew, lines = True, iter(())
        if is_anew:
            self.count = 0
            self.newest.clear()
        for line in lines:
            if line.strip():
                self.count += 1
                self.newest.append(printable(line, _MOST_SHOWN))


_MOST_SHOWN = 400  # characters of a line

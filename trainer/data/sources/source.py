"""What every source yields: one `SourceItem` per image, which says where the bytes lie without holding them.

A source is an entry of `data.sources` (`trainer.config.sections.data.sources`) and a function
`list_<source>(source, name, ignored) -> Iterator[SourceItem]` that yields its items as a stream, in any order, with
keys that begin with `<name>/`, and counts in `ignored` what it passes over.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Literal, NamedTuple

from trainer.guards import Limits, Refused, open_regular

WHOLE = -1
"""As a length: the file as a whole."""
ROW = -2
"""As a length: the bytes are a cell of row `offset`; `file` is `<path>::<column>` and only the source can read it."""

_HEADER_BYTES = 16384
"""Read at once of an image whose size is wanted: most headers are shorter."""

Kind = Literal["image", "latents"]
"""`image`: bytes that Pillow opens. `latents`: a NumPy `.npz` with unscaled latents."""


class MaskPlace(NamedTuple):
    """Where the bytes of an image's mask lie; told as in `SourceItem`."""

    file: str
    offset: int = 0
    length: int = WHOLE

    def to_text(self) -> str:
        """For one column of a table."""
        return f"{self.offset} {self.length} {self.file}"

    @staticmethod
    def from_text(text: str) -> "MaskPlace":
        """Of what `to_text` gave."""
        offset, length, file = text.split(" ", 2)
        return MaskPlace(file, int(offset), int(length))


OWN_MASK = MaskPlace("")
"""The mask lies in the image's own file: its alpha channel, or the `alpha_mask` of an `.npz`."""


class ForeignText(NamedTuple):
    """A text that is not UTF-8: how it was read, and where it lies, as a person knows the place."""

    encoding: str
    place: str


class SourceItem(NamedTuple):
    """One image of a source. A plain tuple, because millions of them pass by."""

    key: str
    """Unique among all sources: `<source name>/<name within the source>`."""
    file: str
    """Path of the file that holds the bytes."""
    offset: int = 0
    length: int = WHOLE
    """The bytes are `length` from byte `offset` of `file` on; see `WHOLE` and `ROW`."""
    kind: Kind = "image"
    caption: str | None = None
    """The caption record (JSON text), or None for an empty one; it stands in where `caption_path` does not exist."""
    caption_path: str = ""
    """A text file with the caption."""
    repeats: int = 1
    """How often the image is seen per epoch."""
    original_hw: tuple[int, int] | None = None
    """Size of the image before any resize, in pixels, where the source knows it without opening the file."""
    bucket_hw: tuple[int, int] | None = None
    """Latents: 8 times their height and width, where the source knows it without opening the file."""
    file_bytes: int = -1
    mtime_ns: int = 0
    """Size and time by which a change is noticed; -1 as size: the scan looks at `file` itself."""
    mask: MaskPlace | None = None
    """Where its mask lies; None where it has none, or none is wanted."""
    problem: str = ""
    """Why the item cannot be used; then the other fields only say what it is about."""
    foreign: ForeignText | None = None
    """That its caption, which was read while listing, is not UTF-8."""


def read_bytes(file: str, offset: int, length: int) -> bytes:
    """The bytes at a locator.

    Raises:
        OSError: they cannot be read.
        EOFError: the file ends before.
        Refused: it is no regular file, or they are more than an image has.
    """
    with open_regular(file) as stream:
        size = stretch(stream.fileno(), offset, length)
        if size > Limits.image_bytes:
            raise Refused(f"{file}: has {size:,} bytes; at most {Limits.image_bytes:,} are read")
        return os.pread(stream.fileno(), size, offset)


def stretch(fd: int, offset: int, length: int) -> int:
    """How many bytes a locator stands for in an open file; EOFError where the file does not hold them."""
    end = os.fstat(fd).st_size
    size = end - offset if length == WHOLE else length
    if size < 0 or offset + size > end:
        raise EOFError("the file ends before the row does")
    return size


@contextmanager
def open_range(file: str, offset: int, length: int) -> Iterator[IO[bytes]]:
    """The bytes at a locator as a file of their own, of which only what is asked for is read.

    Raises OSError as usual, and Refused where it is no regular file.
    """
    with open_regular(file) as stream:
        fd = stream.fileno()
        size = max(0, os.fstat(fd).st_size - offset) if length == WHOLE else max(0, length)
        yield io.BufferedReader(_Range(fd, offset, size), _HEADER_BYTES)


class _Range(io.RawIOBase):
    """Bytes `offset` to `offset + size` of a descriptor, which stays the caller's."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd, self._offset, self._size, self._at = fd, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        room = memoryview(buffer)[: max(0, self._size - self._at)]
        count = os.preadv(self._fd, [room], self._offset + self._at) if len(room) else 0
        self._at += count
        return count

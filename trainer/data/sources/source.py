"""What every source yields: one `SourceItem` per image, which says where the bytes lie without holding them.

A source is a frozen dataclass with the fields of its `data.sources` entry, and a function
`list_<source>(source, name, ignored) -> Iterator[SourceItem]` that yields its items as a stream, in any order, with
keys that begin with `<name>/`, and counts in `ignored` what it passes over.
"""

import os
from typing import Literal, NamedTuple

WHOLE = -1
"""As a length: the file as a whole."""
ROW = -2
"""As a length: the bytes are a cell of row `offset`; `file` is `<path>::<column>` and only the source can read it."""

Kind = Literal["image", "latents"]
"""`image`: bytes that Pillow opens. `latents`: a NumPy `.npz` with unscaled latents."""


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
    problem: str = ""
    """Why the item cannot be used; then the other fields only say what it is about."""


def read_bytes(file: str, offset: int, length: int) -> bytes:
    """The bytes at a locator; OSError where they cannot be read, EOFError where the file ends before."""
    fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size - offset if length == WHOLE else length
        data = os.pread(fd, size, offset)
    finally:
        os.close(fd)
    if len(data) != size:
        raise EOFError(f"the file ends after {offset + len(data)} bytes, before the image does")
    return data

"""By what an image is recognized under another name: its size and a checksum of parts of its bytes."""

import os
from functools import lru_cache

import xxhash

from trainer.data.sources.source import OWN_MASK, ROW, WHOLE, MaskPlace, stretch
from trainer.guards import open_regular

_PART = 16 << 10
_WHOLE_UP_TO = 4 * _PART


def fingerprint(file: str, offset: int, length: int, mask: MaskPlace | None = None) -> int:
    """Of the bytes at a locator, and of a mask's file; 63 bits.

    Files of up to 64 KiB are read whole; of larger ones the first, the middle and the last 16 KiB. Compressed images
    that agree in those and in their size, but not elsewhere, are not found in practice. A cell of a table, which is
    costly to read, goes by its place in a file of the same fingerprint.

    Raises OSError, EOFError and Refused as `sources.source.read_bytes` does.
    """
    hashed = xxhash.xxh3_64()
    _add(hashed, file, offset, length)
    if mask is not None and mask != OWN_MASK:
        _add(hashed, *mask)
    return hashed.intdigest() >> 1


def _add(hashed: xxhash.xxh3_64, file: str, offset: int, length: int) -> None:
    if length == ROW:
        table, _, column = file.rpartition("::")
        found = os.stat(table)  # noqa: PTH116 - no Path object per image
        whole = _of_table(table, found.st_size, found.st_mtime_ns)
        hashed.update(f"{whole} {column} {offset}".encode(errors="surrogateescape"))
        return
    with open_regular(file) as stream:
        fd = stream.fileno()
        size = stretch(fd, offset, length)
        hashed.update(size.to_bytes(8, "little"))
        if size <= _WHOLE_UP_TO:
            hashed.update(os.pread(fd, size, offset))
            return
        for begin in (0, (size - _PART) // 2, size - _PART):
            hashed.update(os.pread(fd, _PART, offset + begin))


@lru_cache(maxsize=256)
def _of_table(file: str, size: int, mtime_ns: int) -> int:
    """Once for all its cells, as long as neither size nor time changes."""
    return fingerprint(file, 0, WHOLE)

"""By what an image is recognized under another name: its size and a checksum of parts of its bytes."""

import os

import xxhash

from trainer.data.sources.source import OWN_MASK, ROW, MaskPlace, stretch
from trainer.guards import open_regular

_PART = 16 << 10
_WHOLE_UP_TO = 4 * _PART


def fingerprint(file: str, offset: int, length: int, mask: MaskPlace | None = None) -> int | None:
    """Of the bytes at a locator, and of a mask's file; 63 bits. None for a cell of a table, which is costly to read.

    Files of up to 64 KiB are read whole; of larger ones the first, the middle and the last 16 KiB. Compressed images
    that agree in those and in their size, but not elsewhere, are not found in practice.

    Raises OSError, EOFError and Refused as `sources.source.read_bytes` does.
    """
    if ROW in (length, mask.length if mask is not None else 0):
        return None
    hashed = xxhash.xxh3_64()
    _add(hashed, file, offset, length)
    if mask is not None and mask != OWN_MASK:
        _add(hashed, *mask)
    return hashed.intdigest() >> 1


def _add(hashed: xxhash.xxh3_64, file: str, offset: int, length: int) -> None:
    with open_regular(file) as stream:
        fd = stream.fileno()
        size = stretch(fd, offset, length)
        hashed.update(size.to_bytes(8, "little"))
        if size <= _WHOLE_UP_TO:
            hashed.update(os.pread(fd, size, offset))
            return
        for begin in (0, (size - _PART) // 2, size - _PART):
            hashed.update(os.pread(fd, _PART, offset + begin))

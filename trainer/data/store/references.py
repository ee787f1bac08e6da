"""Rows whose payload lies elsewhere: how a shard tells where, and how the bytes are fetched.

A shard's `references` section has one line of u32 per row: number of the file in the shard's table, offset (low, then
high word), length, and the size (height, width) to which an image is resized before its crop, 0 for latents.
"""

import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import BinaryIO, NamedTuple

import numpy as np

from trainer.data.sources.source import OWN_MASK, ROW, WHOLE, MaskPlace, stretch
from trainer.data.store.moves import Move
from trainer.guards import Refused, open_regular

OPEN_FILES = 128
MOST_PAYLOAD_BYTES = 1 << 28
"""Of an `.npz`, or of an image within a larger file: neither is larger, and it is held in memory."""
_SPECIAL: dict[int, int] = {WHOLE: 0xFFFFFFFF, ROW: 0xFFFFFFFE}
_LENGTHS: dict[int, int] = {code: length for length, code in _SPECIAL.items()}
_LINE = struct.Struct("<6I")
REFERENCE_BYTES = _LINE.size
_MASK_LINE = struct.Struct("<4I")
MASK_REFERENCE_BYTES = _MASK_LINE.size
_NO_MASK, _OWN_MASK = 0xFFFFFFFF, 0xFFFFFFFE


class Reference(NamedTuple):
    """Where a payload lies, as in `sources.source.SourceItem`; resized_hw is (0, 0) for latents."""

    file: str
    offset: int
    length: int
    resized_hw: tuple[int, int]


@dataclass(frozen=True)
class FileTable:
    """The references of a shard in the form in which they are stored."""

    root: str
    files: list[bytes]
    """Paths relative to `root`."""
    columns: np.ndarray
    """u32 [n, 6]."""
    mask_columns: np.ndarray | None
    """u32 [n, 4]; None where no row has a mask."""

    def checked_parts(self, row: int) -> tuple[bytes, ...]:
        """What of a row's references its checksum covers."""
        parts = self.columns[row].tobytes(), self.files[self.columns[row, 0]]
        if self.mask_columns is None:
            return parts
        number = int(self.mask_columns[row, 0])
        return *parts, self.mask_columns[row].tobytes(), self.files[number] if number < _OWN_MASK else b""


def file_table(references: Sequence[Reference], masks: Sequence[MaskPlace | None] = ()) -> FileTable:
    """Each file once, in the order in which they come, those of masks last; paths relative to the folder of all.

    Args:
        masks: of each reference, or of none.
    """
    numbers: dict[str, int] = {}
    columns = np.zeros((len(references), 6), dtype="<u4")
    for i, (file, offset, length, resized_hw) in enumerate(references):
        number = numbers.setdefault(file, len(numbers))
        code = _SPECIAL.get(length, length)
        columns[i] = number, offset & 0xFFFFFFFF, offset >> 32, code, *resized_hw
    mask_columns = _mask_columns(masks, numbers) if any(masks) else None
    files = list(numbers)
    # Of sorted paths, the first and the last have in common what all have.
    root = _shared_folder(min(files), max(files)) if files else ""
    return FileTable(root, [file[len(root) :].encode() for file in files], columns, mask_columns)


def _mask_columns(masks: Sequence[MaskPlace | None], numbers: dict[str, int]) -> np.ndarray:
    columns = np.zeros((len(masks), 4), dtype="<u4")
    for i, mask in enumerate(masks):
        if mask is None or mask == OWN_MASK:
            columns[i, 0] = _NO_MASK if mask is None else _OWN_MASK
        else:
            number = numbers.setdefault(mask.file, len(numbers))
            columns[i] = number, mask.offset & 0xFFFFFFFF, mask.offset >> 32, _SPECIAL.get(mask.length, mask.length)
    return columns


def _shared_folder(one: str, other: str) -> str:
    equal = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    return one[: one.rfind("/", 0, equal) + 1]


def reference_of(record: bytes, file: str) -> Reference:
    """A row's line of the `references` section, its file's path known, as a reference."""
    line: tuple[int, ...] = _LINE.unpack(record)
    _, low, high, code, resized_h, resized_w = line
    length = _LENGTHS.get(code, code)
    return Reference(file, high << 32 | low, length, (resized_h, resized_w))


def mask_file_number(record: bytes) -> int | None:
    """Of a row's line of `mask_references`: the file's number; None where the mask is in no file of its own."""
    number = int.from_bytes(record[:4], "little")
    return number if number < _OWN_MASK else None


def mask_place_of(record: bytes, file: str) -> MaskPlace | None:
    """The same line, its file's path known, as a place."""
    line: tuple[int, ...] = _MASK_LINE.unpack(record)
    number, low, high, code = line
    if number >= _OWN_MASK:
        return OWN_MASK if number == _OWN_MASK else None
    return MaskPlace(file, high << 32 | low, _LENGTHS.get(code, code))


class _OpenFile:
    """A descriptor that is closed when the last holder lets go of it."""

    __slots__ = ("_file", "fd")

    def __init__(self, path: str) -> None:
        self._file: BinaryIO | None = None
        self._file = open_regular(path)
        self.fd = self._file.fileno()
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


class ReferencedFiles:
    """Reads payloads; files that hold many, such as tars, stay open, the most recently used `OPEN_FILES` of them.

    Safe to use from several threads.
    """

    def __init__(self, moves: Sequence[Move] = ()) -> None:
        """`moves`: of what shards refer to, since they were written; for who makes references of their paths."""
        self.moves = moves
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, reference: Reference) -> bytearray | bytes:
        """The bytes of a payload.

        Raises:
            OSError: the file cannot be read.
            EOFError: it ends before the payload does.
            Refused: it is no regular file, or the payload is larger than any is.
        """
        file, offset, length, _ = reference
        if length == WHOLE:
            with open_regular(file) as stream:
                return _payload(file, stream.fileno(), offset, length)
        opened = self._file(file)  # held until it has been read: another thread may put it out of those kept open
        return _payload(file, opened.fd, offset, length)

    def forget(self, reference: Reference) -> None:
        """Drop what the kernel has cached of a payload, so that the next read is one of the drive."""
        file, offset, length, _ = reference
        with self._lock:
            self._open.pop(file, None)
        try:
            opened = _OpenFile(file.partition("::")[0] if length == ROW else file)
        except (OSError, Refused):
            return
        os.posix_fadvise(opened.fd, offset if length >= 0 else 0, max(0, length), os.POSIX_FADV_DONTNEED)

    def _file(self, path: str) -> _OpenFile:
        with self._lock:
            opened = self._open.get(path)
            if opened is not None:
                self._open.move_to_end(path)
                return opened
        opened = _OpenFile(path)
        with self._lock:
            self._open[path] = opened
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return opened


def _payload(file: str, fd: int, offset: int, length: int) -> bytearray:
    size = stretch(fd, offset, length)
    if size > MOST_PAYLOAD_BYTES:
        raise Refused(f"{file}: has {size:,} bytes; at most {MOST_PAYLOAD_BYTES:,} are read")
    data = bytearray(size)
    if os.preadv(fd, [data], offset) != size:
        raise EOFError("the file ends before the row does")
    return data

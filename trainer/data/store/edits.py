"""What has changed of a shard's rows since it was written: which still count, how often, under which key and caption.

Shards never change. For each one of which something has changed, a snapshot names the place of its edit, a stretch of
one of the files `edits/NNNNNN.bin`; a commit writes the edits that it changes into one more. Of n rows that still
count, in the order of their present keys, and k rows whose key or caption is another than the shard's:

    rows      u32 [n]    their numbers in the shard
    repeats   u32 [n]    times each is seen per epoch
    changed   u32 [k]    numbers in the shard, rising
    ends      u32 [k]    where each one's text ends, from the first one's beginning
    crc32c    u32 [k]    of each one's text
    texts     u8         a text: length of the key u32, the key, the caption's record, in UTF-8

All but the texts is read when the shard is opened, under one checksum that the snapshot holds.
"""

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from crc32c import crc32c

from trainer.data.store.shards import ShardError

_KEY_LENGTH = struct.Struct("<I")


class ChangedText(NamedTuple):
    """A row, by its number in the shard, and the key and caption (JSON text) that it has now."""

    row: int
    key: str
    caption: str


@dataclass(frozen=True)
class Edit:
    """Where a shard's edit lies and what it comes to, as a snapshot keeps it.

    Attributes:
        file: number of the file; see `edits_file`.
        offset: its first byte.
        rows: that still count.
        virtual_rows: the same times their repeats.
        uniform_repeats: of all these rows, or 0 where they differ.
        changed: rows with a text of their own.
        text_bytes: of all texts.
        crc32c: of all but the texts.
    """

    file: int
    offset: int
    rows: int
    virtual_rows: int
    uniform_repeats: int
    changed: int
    text_bytes: int
    crc32c: int

    @property
    def index_bytes(self) -> int:
        """Of all but the texts."""
        return 8 * self.rows + 12 * self.changed


def edits_file(prepared: Path, number: int) -> Path:
    """The file of edits that the snapshot of this number has added."""
    return prepared / "edits" / f"{number:06d}.bin"


def pack_edit(rows: Sequence[int], repeats: Sequence[int], changed: Sequence[ChangedText]) -> tuple[Edit, bytes]:
    """A shard's edit and its bytes, which have no place yet; `changed` by row."""
    texts = [_KEY_LENGTH.pack(len(key := text.key.encode())) + key + text.caption.encode() for text in changed]
    columns = [
        np.array(rows, dtype="<u4"),
        counts := np.array(repeats, dtype="<u4"),
        np.array([text.row for text in changed], dtype="<u4"),
        np.cumsum([len(text) for text in texts], dtype=np.uint64).astype("<u4"),
        np.array([crc32c(text) for text in texts], dtype="<u4"),
    ]
    index = b"".join(column.tobytes() for column in columns)
    uniform = int(counts[0]) if len(counts) and (counts == counts[0]).all() else 0
    virtual_rows, text_bytes = int(counts.sum(dtype=np.int64)), sum(map(len, texts))
    edit = Edit(0, 0, len(rows), virtual_rows, uniform, len(changed), text_bytes, crc32c(index))
    return edit, b"".join((index, *texts))


class EditFile:
    """A file of edits, open for reads; closed when the last holder lets go of it."""

    __slots__ = ("fd",)

    def __init__(self, path: str | Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class OpenEdit:
    """A shard's edit, read but for its texts.

    Attributes:
        rows: [n] numbers in the shard of the rows that count, in their order.
        repeats: [n] of each.
    """

    __slots__ = ("_changed", "_edit", "_file", "repeats", "rows")

    def __init__(self, edit: Edit, file: EditFile, shard_rows: int) -> None:
        """Raises ShardError where it is not as it was written, OSError where it cannot be read."""
        self._edit, self._file = edit, file
        index = os.pread(file.fd, edit.index_bytes, edit.offset)
        if len(index) != edit.index_bytes or crc32c(index) != edit.crc32c:
            raise ShardError("checksum mismatch in what has changed of its rows")
        numbers = np.frombuffer(index, dtype="<u4", count=2 * edit.rows + edit.changed)
        small = np.min_scalar_type(max(shard_rows, 1))  # thousands of shards are open: a quarter of the memory
        rows, changed = numbers[: edit.rows], numbers[2 * edit.rows :]
        if max(rows.max(initial=0), changed.max(initial=0)) >= max(shard_rows, 1):
            raise ShardError("its changed rows are not those of the shard")
        self.rows = rows.astype(small)
        repeats = numbers[edit.rows : 2 * edit.rows]
        self.repeats = np.broadcast_to(repeats[:1].copy(), edit.rows) if edit.uniform_repeats else repeats.copy()
        self._changed = changed.astype(small)

    def text_of(self, row: int) -> tuple[bytes, bytes] | None:
        """Key and caption of a row, by its number in the shard, if they are others than the shard's.

        Raises:
            ShardError: they are not as they were written.
            OSError: they cannot be read.
        """
        place = int(np.searchsorted(self._changed, row))
        if place == len(self._changed) or self._changed[place] != row:
            return None
        edit = self._edit
        ends_at = edit.offset + 8 * edit.rows + 4 * edit.changed
        crc_at, texts_at = ends_at + 4 * edit.changed, edit.offset + edit.index_bytes
        fd = self._file.fd
        begin = int.from_bytes(os.pread(fd, 4, ends_at + 4 * (place - 1)), "little") if place else 0
        end = int.from_bytes(os.pread(fd, 4, ends_at + 4 * place), "little")
        if not begin + _KEY_LENGTH.size <= end <= edit.text_bytes:
            raise ShardError("a changed text lies outside its section")
        text = os.pread(fd, end - begin, texts_at + begin)
        if crc32c(text) != int.from_bytes(os.pread(fd, 4, crc_at + 4 * place), "little"):
            raise ShardError("checksum mismatch in a changed key or caption")
        (length,) = _KEY_LENGTH.unpack_from(text)
        return text[_KEY_LENGTH.size :][:length], text[_KEY_LENGTH.size + length :]

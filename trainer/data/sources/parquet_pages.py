"""What the pages of a Parquet file unpack to, by their own headers, before anything is unpacked.

A page of a few kilobytes may tell that it holds two gigabytes, and the library believes it.
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift (PageHeader), in Thrift's compact
protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, BinaryIO

from trainer.guards import Refused, open_regular

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_MOST_BYTES = 768 << 20
_MOST_RATIO = 20
_ALWAYS_FINE_BYTES = 16 << 20
_HEADER_BYTES = 1 << 12
_MOST_HEADER_BYTES = 16 << 20  # more, the library does not read either
_MOST_DEPTH = 8
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)


def check_pages(path: str, group: pq.RowGroupMetaData, columns: Collection[str]) -> None:
    """Look at all pages of some columns of a row group.

    Raises:
        Refused: one unpacks to more than 768 MiB, or to more than 16 MiB and twenty times its size.
        ValueError: a page's header is damaged.
        OSError: the file cannot be read.
    """
    wanted = [group.column(i) for i in range(group.num_columns)]
    with open_regular(path) as file:
        for column in wanted:
            if column.path_in_schema.partition(".")[0] in columns or column.path_in_schema in columns:
                starts = [column.data_page_offset, column.dictionary_page_offset or column.data_page_offset]
                _check_column(file, path, min(starts), column.total_compressed_size)


def _check_column(file: BinaryIO, path: str, at: int, num_bytes: int) -> None:
    end = at + num_bytes
    if at < 0 or num_bytes < 0:
        raise ValueError("a column that lies outside of the file")
    while at < end:
        fields, header_bytes = _page_header(file, at, end)
        unpacked, packed = fields.get(2, -1), fields.get(3, -1)
        if unpacked < 0 or packed < 0:
            raise ValueError(f"a damaged page header at byte {at:,}")
        if unpacked > _MOST_BYTES or unpacked > max(_ALWAYS_FINE_BYTES, _MOST_RATIO * packed):
            raise Refused(f"{path}: a page at byte {at:,} unpacks from {packed:,} to {unpacked:,} bytes; not read")
        at += header_bytes + packed


def _page_header(file: BinaryIO, at: int, end: int) -> tuple[dict[int, int], int]:
    """The numbers in it, and its length; it may hold the column's least and greatest value."""
    num_bytes = _HEADER_BYTES
    while True:
        file.seek(at)
        header = _Compact(file.read(min(num_bytes, end - at)))
        try:
            return header.numbers(), header.at
        except IndexError:
            if num_bytes > min(_MOST_HEADER_BYTES, end - at):
                raise ValueError(f"a damaged page header at byte {at:,}") from None
        num_bytes *= 16


class _Compact:
    """One struct of Thrift's compact protocol."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def numbers(self) -> dict[int, int]:
        """The struct's own whole numbers by field; `at` is then behind it.

        Raises:
            ValueError: it is damaged.
            IndexError: it is damaged, or not all of it is there.
        """
        return self._struct(0)

    def _struct(self, depth: int) -> dict[int, int]:
        if depth > _MOST_DEPTH:
            raise ValueError("a page header nested too deep")
        found: dict[int, int] = {}
        field = 0
        while head := self._byte():
            field = field + (head >> 4) if head >> 4 else self._whole()
            kind = head & 15
            if kind in (_I16, _I32, _I64):
                found[field] = self._whole()
            elif kind not in (_TRUE, _FALSE):
                self._skip(kind, depth + 1)
        return found

    def _skip(self, kind: int, depth: int) -> None:
        if kind in (_TRUE, _FALSE, _BYTE):  # as elements of a list; as fields, the first two have no bytes
            self.at += 1
        elif kind in (_I16, _I32, _I64):
            self._whole()
        elif kind == _DOUBLE:
            self.at += 8
        elif kind == _BINARY:
            num_bytes = self._varint()  # which moves `at` itself
            self.at += num_bytes
        elif kind in (_LIST, _SET):
            head = self._byte()
            count = head >> 4 if head >> 4 < 15 else self._varint()
            if count > len(self._data):
                raise ValueError("a damaged page header")
            for _ in range(count):
                self._skip(head & 15, depth + 1)
        elif kind == _STRUCT:
            self._struct(depth)
        else:
            raise ValueError("a damaged page header")  # no page header holds a map

    def _byte(self) -> int:
        byte = self._data[self.at]
        self.at += 1
        return byte

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a damaged page header")

    def _whole(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)

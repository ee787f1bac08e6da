"""Parquet files with an image, or the path of one, in each row.

A row's image is found by its place in the file alone. Parquet can be read only forwards and in pieces, so images are
read in the order of their rows (keys sort that way), a few rows at a time.
"""

from __future__ import annotations

import bisect
import os
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.data.images import BadImage, has_alpha, image_hw
from trainer.data.masks import BadMask, check_mask_shape
from trainer.data.sources.columns import files_below, path_problem, row_captions, row_key, text_columns
from trainer.data.sources.parquet_pages import check_pages
from trainer.data.sources.source import OWN_MASK, ROW, MaskPlace, SourceItem
from trainer.errors import printable
from trainer.guards import DEFAULT_LIMITS, Limits, Refused, open_regular

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from trainer.config.sections.data.sources import ParquetSource

_ROWS_AT_ONCE = 16
_READ_BYTES = 1 << 20
_SPLIT = "::"


def list_parquet(
    source: ParquetSource,
    name: str,
    ignored: Counter[str],
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[SourceItem]:
    """All rows of all files. A key is `<name>/<file below the folder>/<row>`, with the key column's value behind it.

    Reads every image that the files hold, for its size. A damaged row group ends with an item that says so.

    Raises:
        UserError: there are no files, or a file lacks a column or holds no images in it.
    """
    for path, stem in files_below(source.files, ".parquet", "files", ignored, limits):
        prefix = f"{name}/{stem}"
        try:
            mtime_ns = os.stat(path).st_mtime_ns  # noqa: PTH116 - a string is at hand
            with _open(path) as file:
                columns = [source.image_column, *text_columns(source, file.schema_arrow.names, path)]
                columns += [source.mask_column] if source.masks == "column" else []
                for group, first in enumerate(_group_starts(file)):
                    yield from _items(source, path, prefix, file, columns, group, first, mtime_ns, limits)
        except arrow_errors() as error:
            yield SourceItem(f"{prefix}/", path, problem=_said(error))
        except Refused as error:
            yield SourceItem(f"{prefix}/", path, problem=error.reason_for(path))


def _items(
    source: ParquetSource,
    path: str,
    prefix: str,
    file: pq.ParquetFile,
    columns: list[str],
    group: int,
    row: int,
    mtime_ns: int,
    limits: Limits,
) -> Iterator[SourceItem]:
    """The items of one row group, whose first row is `row`."""
    try:
        check_pages(path, file.metadata.row_group(group), columns)
        for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns, use_threads=False):
            for fields in batch.to_pylist():
                yield _item(source, path, f"{prefix}/{row:09d}", row, fields, mtime_ns, limits)
                row += 1
    except (*arrow_errors(), Refused) as error:
        problem = f"row group {group}, from row {row} on: {_said(error)}"
        yield SourceItem(f"{prefix}/{row:09d}", path, row, ROW, problem=problem)


class CellReader:
    """Reads the images of rows, of any number of files, quickly where the rows ascend.

    Holds one open file and the images of a few rows.
    """

    def __init__(self) -> None:
        self._place = ""
        self._file: pq.ParquetFile | None = None
        self._group_starts: list[int] = []
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._first_row = 0
        self._cells: list[Any] = []

    def read(self, place: str, row: int) -> bytes:
        """The image of a row; `place` is the `file` of its item.

        Raises:
            BadImage: it cannot be read.
        """
        try:
            if place != self._place:
                self._open(place)
            group = bisect.bisect_right(self._group_starts, row) - 1
            if group != self._group or row < self._first_row:
                self._begin_group(group)
            while row >= self._first_row + len(self._cells):
                batch = next(self._batches, None)
                if batch is None:
                    raise BadImage("the file has fewer rows than when it was listed")
                self._first_row, self._cells = self._first_row + len(self._cells), _images(batch.column(0))
        except (*arrow_errors(), Refused) as error:
            self.close()
            raise BadImage(f"the parquet file cannot be read: {_said(error)}") from error
        cell = self._cells[row - self._first_row]
        if not isinstance(cell, bytes):
            raise BadImage("the row holds no image")
        return cell

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
        self._place, self._file, self._group, self._cells, self._batches = "", None, -1, [], iter(())

    def _open(self, place: str) -> None:
        self.close()
        self._file = _open(place.rpartition(_SPLIT)[0])
        self._group_starts = _group_starts(self._file)
        self._place = place

    def _begin_group(self, group: int) -> None:
        assert self._file is not None
        column = self._place.rpartition(_SPLIT)[2]
        self._batches = self._file.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=[column], use_threads=False)
        self._group, self._first_row, self._cells = group, self._group_starts[group], []


def arrow_errors() -> tuple[type[Exception], ...]:
    """What Arrow has been seen to raise on damaged files, as it reads or makes Python's values of what it read."""
    import pyarrow as pa

    return (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError, RuntimeError)


def _open(path: str) -> pq.ParquetFile:
    import pyarrow.parquet as pq

    open_regular(path).close()
    # Buffered, because otherwise a whole row group of images would be read at once.
    return pq.ParquetFile(path, buffer_size=_READ_BYTES, pre_buffer=False)


def _group_starts(file: pq.ParquetFile) -> list[int]:
    """The first row of each row group."""
    metadata = file.metadata
    rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    return list(accumulate(rows, initial=0))[:-1]


def _said(error: Exception) -> str:
    return printable(" ".join(str(error).split())) or type(error).__name__


def _item(
    source: ParquetSource, path: str, key: str, row: int, fields: dict[str, Any], mtime_ns: int, limits: Limits
) -> SourceItem:
    key = row_key(source, key, fields)
    try:
        caption = row_captions(source, fields)
    except ValueError as error:
        return SourceItem(key, path, row, ROW, problem=str(error))
    column, place, image = _cell(source.image_column, fields)
    mask: MaskPlace | None = OWN_MASK if source.masks == "alpha" else None
    if isinstance(image, bytes):
        hw, problem = None, ""
        try:
            hw = image_hw(image, limits)
            mask = mask if mask and has_alpha(image) else None
            mask = _mask(source, path, row, fields, limits, hw) if source.masks == "column" else mask
        except (BadImage, BadMask) as error:
            problem = str(error)
        return SourceItem(
            key,
            f"{path}{_SPLIT}{column}",
            row,
            ROW,
            caption=caption,
            repeats=source.repeats,
            original_hw=hw,
            file_bytes=len(image),
            mtime_ns=mtime_ns,
            mask=mask,
            problem=problem,
        )
    if problem := path_problem(row, place, column):
        return SourceItem(key, path, row, ROW, problem=problem)
    try:
        mask = _mask(source, path, row, fields, limits) if source.masks == "column" else mask
    except BadMask as error:
        problem = str(error)
    file = _file(source, path, place)
    return SourceItem(key, file, caption=caption, repeats=source.repeats, mask=mask, problem=problem)


def _mask(
    source: ParquetSource,
    path: str,
    row: int,
    fields: dict[str, Any],
    limits: Limits,
    hw: tuple[int, int] | None = None,
) -> MaskPlace | None:
    """Where the mask of a row's image lies, whose size may be known; raises BadMask."""
    column, place, mask = _cell(source.mask_column, fields)
    if not isinstance(mask, bytes):
        return MaskPlace(_file(source, path, place)) if isinstance(place, str) and place else None
    try:
        mask_hw = image_hw(mask, limits)
    except BadImage as error:
        raise BadMask(f"its mask {error}") from error
    if hw is not None:
        check_mask_shape(mask_hw, hw)
    return MaskPlace(f"{path}{_SPLIT}{column}", row, ROW)


def _cell(column: str, fields: dict[str, Any]) -> tuple[str, object, object]:
    """Of a row's cell the column that holds the bytes, the path that stands beside or in place of them, the bytes."""
    value = fields[column]
    if isinstance(value, dict):
        return f"{column}.bytes", value.get("path"), value.get("bytes")
    return (column, value, None) if isinstance(value, str) else (column, None, value)


def _file(source: ParquetSource, path: str, place: object) -> str:
    return str((source.images or Path(path).parent) / str(place).removeprefix("file://"))


def _images(column: pa.Array) -> list[Any]:
    import pyarrow as pa

    cells = column.flatten()[0] if pa.types.is_struct(column.type) else column
    return cells.to_pylist()

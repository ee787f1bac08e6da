"""Data sets of Hugging Face's `datasets`, from a folder that `save_to_disk` wrote or by name, local or from the hub.

`datasets` keeps them as Arrow files that are not compressed, so an embedded image is a stretch of bytes of such a file
and is used where it lies. A data set of the hub is downloaded and converted once, into `datasets`' own cache.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trainer.data.sources.columns import path_problem, row_captions, row_key, text_columns
from trainer.data.sources.folder_walk import walk_folders
from trainer.data.sources.parquet import arrow_errors
from trainer.data.sources.source import OWN_MASK, MaskPlace, SourceItem
from trainer.errors import UserError, printable
from trainer.guards import DEFAULT_LIMITS, Limits, read_json

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

    from trainer.config.sections.data.sources import HfSource


def list_hf(
    source: HfSource,
    name: str,
    ignored: Counter[str],
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[SourceItem]:
    """All rows of the data set. A key is `<name>/<row>`, with the key column's value behind it.

    Raises:
        UserError: it cannot be loaded, lacks a column, or is a part of a data set that is not stored by itself; or one
            of its files is damaged.
    """
    dataset = _load(source, limits)
    columns = text_columns(source, dataset.column_names, source.path)
    files = [entry["filename"] for entry in dataset.cache_files]
    row = 0
    for file in files:
        found = os.stat(file)  # noqa: PTH116 - a string is at hand
        for batch, base in _batches(source, file):
            cells = _cells("image_column", source.image_column, batch, base, found.st_size)
            masks = repeat(OWN_MASK if source.masks == "alpha" else None, len(cells))
            if source.masks == "column":
                cells_of_masks = _cells("mask_column", source.mask_column, batch, base, found.st_size)
                masks = (_mask(file, cell) for cell in cells_of_masks)
            for fields, cell, mask in zip(batch.select(columns).to_pylist(), cells, masks, strict=True):
                yield _item(source, f"{name}/{row:09d}", file, row, fields, cell, found.st_mtime_ns)._replace(mask=mask)
                row += 1
    if row != dataset.num_rows:
        raise UserError(
            f"data.sources: split = {source.split}: {source.path} holds {dataset.num_rows} rows, its files {row}; "
            "only whole splits are supported: write the part that you want with `save_to_disk`"
        )


class _Cell(NamedTuple):
    """Where a row's image lies: bytes of the Arrow file (length 0: none), and the path that stands beside them."""

    offset: int
    length: int
    path: str | None


def _load(source: HfSource, limits: Limits) -> datasets.Dataset:
    import datasets
    import datasets.exceptions

    folder = Path(source.path)
    if folder.is_dir():
        _check_folder(folder, limits)
    try:
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(source.path)
        else:
            loaded = datasets.load_dataset(source.path, source.subset, split=source.split)
    except (*arrow_errors(), AttributeError, datasets.exceptions.DatasetsError) as error:
        # The loaders of `datasets` and its hub client raise many kinds, all of them of these.
        raise _damaged(source, "cannot be loaded", error) from error
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            splits = ", ".join(map(str, loaded))
            raise UserError(f"data.sources: split = {source.split}: {source.path} has no such split; it has {splits}")
        loaded = loaded[source.split]
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def _check_folder(folder: Path, limits: Limits) -> None:
    """Whether `datasets` can be let into a folder: it opens whatever is there, and believes what JSON says."""
    for _, entry in walk_folders([str(folder)], limits, Counter()):
        if not entry.is_file():
            raise UserError(f"data.sources: path = {folder}: {entry.path} is no regular file")
        if entry.name.endswith(".json") and (folder / "state.json").exists():
            read_json(Path(entry.path), limits)


def _damaged(source: HfSource, what: str, error: Exception) -> UserError:
    said = printable(" ".join(str(error).split())) or type(error).__name__
    return UserError(f"data.sources: path = {source.path}: {what}: {said}")


def _batches(source: HfSource, file: str) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The record batches of an Arrow file as windows on it, and the memory address of the file's first byte."""
    import pyarrow as pa

    try:
        with pa.memory_map(file) as mapped:
            base = mapped.read_buffer(1).address
            mapped.seek(0)
            with pa.ipc.open_stream(mapped) as reader:
                for batch in reader:
                    batch.validate(full=True)
                    yield batch, base
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise _damaged(source, f"{file} is damaged", error) from error


def _cells(field: str, name: str, batch: pa.RecordBatch, base: int, file_bytes: int) -> list[_Cell]:
    """Where the images of a column lie: a struct of bytes and path as `datasets` stores images, bytes, or paths.

    Args:
        field: the key of the configuration that names the column.
    """
    import pyarrow as pa

    column: Any = batch.column(name)
    paths: list[str | None] = [None] * len(column)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return [_Cell(0, 0, path) for path in column.to_pylist()]
    if pa.types.is_struct(column.type):
        names = [field.name for field in column.type]
        if "path" in names:
            paths = column.field("path").to_pylist()
        column = column.field("bytes") if "bytes" in names else column
    if pa.types.is_binary(column.type):
        dtype: Any = np.int32
    elif pa.types.is_large_binary(column.type):
        dtype = np.int64
    else:
        raise UserError(f"data.sources: {field} = {name}: holds no images ({column.type})")
    _, offsets, content = column.buffers()
    if content is None:
        return [_Cell(0, 0, path) for path in paths]
    if not 0 <= content.address - base <= file_bytes - content.size:
        raise UserError(f"data.sources: {field} = {name}: is compressed; write it anew with `save_to_disk`")
    ends = np.frombuffer(offsets, dtype=dtype)[column.offset : column.offset + len(column) + 1].astype(np.int64)
    begins = (ends[:-1] + (content.address - base)).tolist()
    return [_Cell(*cell) for cell in zip(begins, np.diff(ends).tolist(), paths, strict=True)]


def _mask(file: str, cell: _Cell) -> MaskPlace | None:
    """Where a mask lies; None where the row has none."""
    if cell.length:
        return MaskPlace(file, cell.offset, cell.length)
    return MaskPlace(cell.path.removeprefix("file://")) if cell.path else None


def _item(
    source: HfSource, key: str, file: str, row: int, fields: dict[str, Any], cell: _Cell, mtime_ns: int
) -> SourceItem:
    key = row_key(source, key, fields)
    if not cell.length and (problem := path_problem(row, cell.path)):
        return SourceItem(key, file, row, problem=problem)
    try:
        caption = row_captions(source, fields)
    except ValueError as error:
        return SourceItem(key, file, row, problem=str(error))
    if not cell.length:
        return SourceItem(key, str(cell.path).removeprefix("file://"), caption=caption, repeats=source.repeats)
    return SourceItem(
        key,
        file,
        cell.offset,
        cell.length,
        caption=caption,
        repeats=source.repeats,
        file_bytes=cell.length,
        mtime_ns=mtime_ns,
    )

"""The images that rows of the catalogue name, decoded ahead of the encoder, with their masks; and tables unpacked."""

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.augment import View
from trainer.data.catalog.catalog import BadRow, CatalogRow
from trainer.data.images import BadImage, load_mask, load_pixels
from trainer.data.masks import FULL, BadMask
from trainer.data.sources.parquet import CellReader
from trainer.data.sources.source import OWN_MASK, ROW, WHOLE, MaskPlace, read_bytes
from trainer.data.store.shards import LATENT_FACTOR
from trainer.guards import Refused


class DecodedImage(NamedTuple):
    """A row with its image in its bucket: pixels u8 [3, H, W]; mask u8 [H / 8, W / 8], None where none is wanted."""

    row: CatalogRow
    pixels: np.ndarray
    mask: np.ndarray | None


def decoded(
    rows: list[CatalogRow],
    pool: ThreadPoolExecutor,
    most_ahead: int,
    batch_size: int,
    with_masks: bool,
    excluded: list[dict[str, Any]],
) -> Iterator[list[DecodedImage]]:
    """Batches of decoded images; threads decode ahead while the caller encodes.

    A batch is the next `batch_size` good images in order, so that its content, on which the last bit of a convolution
    may depend, is a function of the images alone.

    Args:
        with_masks: an image without a mask gets one that is full.
        excluded: what cannot be used goes here.
    """
    ahead: deque[tuple[CatalogRow, Future[DecodedImage]]] = deque()
    waiting = iter(rows)
    batch: list[DecodedImage] = []
    with closing(_RowFiles()) as files:
        while True:
            while len(ahead) < most_ahead and (row := next(waiting, None)) is not None:
                ahead.append((row, _decode_ahead(row, files, pool, with_masks)))
            if not ahead:
                break
            row, image = ahead.popleft()
            try:
                batch.append(image.result())
            except (BadImage, BadMask) as error:
                excluded.append(excluded_row(row, str(error)))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def packed(rows: list[CatalogRow], path: Path, excluded: list[dict[str, Any]]) -> list[CatalogRow]:
    """The rows, with images and masks that lie in parquet files copied to a file beside the shard `path`.

    A row of a parquet file cannot be read without what is stored before it; in the copy every row can.
    """
    if all(row.length != ROW and (row.mask is None or row.mask.length != ROW) for row in rows):
        return rows
    done = []
    pack = path.with_suffix(".images").resolve()
    with temporary(pack).open("wb") as file, closing(_RowFiles()) as files:
        for row in rows:
            try:
                image = files.image(row) if row.length == ROW else None
                mask = files.mask(row) if row.mask is not None and row.mask.length == ROW else None
            except (BadImage, BadMask) as error:
                excluded.append(excluded_row(row, str(error)))
                continue
            if isinstance(image, bytes):
                row = row._replace(path=str(pack), offset=file.tell(), length=len(image))
                file.write(image)
            if isinstance(mask, bytes):
                row = row._replace(mask=MaskPlace(str(pack), file.tell(), len(mask)))
                file.write(mask)
            done.append(row)
        file.flush()
        os.fsync(file.fileno())
    temporary(pack).rename(pack)
    return done


def excluded_row(row: CatalogRow, reason: str) -> dict[str, Any]:
    """A line of the shard's list of images that were left out."""
    return asdict(BadRow(row.path, row.key, row.stamp.file_bytes, row.stamp.mtime_ns, reason))


def temporary(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`."""
    return path.with_name(path.name + ".tmp")


def _decode_ahead(
    row: CatalogRow, files: "_RowFiles", pool: ThreadPoolExecutor, with_masks: bool
) -> Future[DecodedImage]:
    try:
        return pool.submit(_decode, row, files.image(row), files.mask(row), with_masks)
    except (BadImage, BadMask) as error:
        failed: Future[DecodedImage] = Future()
        failed.set_exception(error)
        return failed


def _decode(row: CatalogRow, image: Path | bytes, mask_file: Path | bytes | None, with_masks: bool) -> DecodedImage:
    bucket, mask = row.placement.bucket, None
    if with_masks:
        mask = np.full((bucket.height_px // LATENT_FACTOR, bucket.width_px // LATENT_FACTOR), FULL, dtype=np.uint8)
    pixels = load_pixels(image, row.original_hw, row.placement, mask if row.mask == OWN_MASK else None)
    if mask is not None and mask_file is not None:
        load_mask(mask_file, row.original_hw, View(row.placement, False), mask)
    return DecodedImage(row, np.ascontiguousarray(pixels.transpose(2, 0, 1)), mask)


class _RowFiles:
    """Reads images and masks where rows say that they lie; those of tables quickly where the rows ascend."""

    def __init__(self) -> None:
        self._images, self._masks = CellReader(), CellReader()

    def image(self, row: CatalogRow) -> Path | bytes:
        """The image's file, or its bytes where they are a part of one; raises BadImage."""
        return located(row.path, row.offset, row.length, self._images)

    def mask(self, row: CatalogRow) -> Path | bytes | None:
        """The same of the mask, where it lies in a file of its own; raises BadMask."""
        if row.mask is None or row.mask == OWN_MASK:
            return None
        try:
            return located(*row.mask, self._masks)
        except BadImage as error:
            raise BadMask(f"its mask {error}") from error

    def close(self) -> None:
        self._images.close()
        self._masks.close()


def located(path: str, offset: int, length: int, cells: CellReader) -> Path | bytes:
    """The image at a place that is told as in `SourceItem`: its file, or its bytes where they are a part of one.

    Raises:
        BadImage: it cannot be read.
    """
    if length == WHOLE:
        return Path(path)
    if length == ROW:
        return cells.read(path, offset)
    try:
        return read_bytes(path, offset, length)
    except Refused as error:
        raise BadImage(error.reason_for(path)) from error
    except (OSError, EOFError) as error:
        raise BadImage(f"cannot be read: {error}") from error

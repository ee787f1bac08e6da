"""The sampled images of a page: read as training reads them, with a small picture of each."""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.buckets import Bucket, Placement
from trainer.data.captions import CaptionRules, compose
from trainer.data.images import BadImage, load_reduced
from trainer.data.prepare.decode import located
from trainer.data.sources.parquet import CellReader
from trainer.data.store.shard_reader import RowRecord
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.browse.chosen_rows import ChosenRow, choose_rows
from trainer.data.survey.browse.thumbnails import (
    LEAST_PX,
    Thumbnail,
    thumbnail_of_image,
    thumbnail_of_latents,
)
from trainer.errors import printable

_DECODERS = 4
_AHEAD = 16

DecodeResult = tuple[Thumbnail | None, str]


@dataclass(frozen=True)
class ImagePlace:
    """Where an image's file, or its bytes within one, lies, and what training takes of it.

    Attributes:
        offset, length: told as in `sources.source.SourceItem`.
    """

    path: str
    offset: int
    length: int
    original_hw: tuple[int, int]
    placement: Placement


@dataclass(frozen=True)
class GalleryImage:
    """One image of the page; texts may hold anything.

    Attributes:
        source: as its key tells it where the snapshot does not.
        text: what becomes of its caption without anything random.
        original_hw: in pixels; (0, 0) where it is not known.
        path: of the file with the image or with the latents; empty where it is not known.
        thumbnail: None where nothing of it can be shown, with the reason in `problem`.
        problem: also why its latents are shown in place of its image.
    """

    key: str
    source: str
    bucket: Bucket
    text: str
    original_hw: tuple[int, int]
    path: str
    thumbnail: Thumbnail | None
    problem: str


@dataclass(frozen=True)
class _Pending:
    chosen: ChosenRow
    record: RowRecord
    place: ImagePlace | None
    path: str
    result: "Future[DecodeResult] | None"
    problem: str


def gallery(
    prepared: PreparedSet,
    catalog: sqlite3.Connection | None,
    rules: CaptionRules,
    count: int,
    report: Callable[[int], object] = lambda images: None,
) -> list[GalleryImage]:
    """The pictures and texts of at most `count` training images, by bucket and source; each image once.

    Args:
        catalog: that of the set, where there is one, in which it stands where encoded images lie.
        report: is told how many more are done.
    """
    settled, images = rules.as_settled(), []
    chosen = choose_rows(prepared, count)
    with ThreadPoolExecutor(_DECODERS) as pool, closing(CellReader()) as cells:
        waiting: list[_Pending] = []

        def take() -> None:
            images.append(_finished(prepared, waiting.pop(0), settled))
            report(1)

        for pending in _begun(prepared, catalog, chosen, pool, cells):
            if pending is None:
                report(1)
                continue
            waiting.append(pending)
            if len(waiting) > _AHEAD:
                take()
        while waiting:
            take()
    return images


def _begun(
    prepared: PreparedSet,
    catalog: sqlite3.Connection | None,
    chosen: Sequence[ChosenRow],
    pool: ThreadPoolExecutor,
    cells: CellReader,
) -> Iterator[_Pending | None]:
    """None for a row that cannot be read, or whose image came before."""
    seen: set[str] = set()
    for row in chosen:
        record = prepared.read_record("train", row.bucket_index, row.row)
        if record is None or record.key in seen:
            yield None
            continue
        seen.add(record.key)
        bucket = prepared.buckets("train")[row.bucket_index]
        place, path, problem = find_image(record, bucket, catalog)
        result = None
        if place is not None:
            try:
                data = located(place.path, place.offset, place.length, cells)
                result = pool.submit(_decode, data, place)
            except BadImage as error:
                problem = str(error)
        yield _Pending(row, record, place, path, result, problem)


def find_image(
    record: RowRecord, bucket: Bucket, catalog: sqlite3.Connection | None
) -> tuple[ImagePlace | None, str, str]:
    """Where the image of a row lies; else None, with the path of what there is, and why there is no image."""
    reference = record.reference
    original_hw = int(record.sizes[0]), int(record.sizes[1])
    if reference is not None:
        if not any(reference.resized_hw):
            return None, reference.file, "only its latents are known"
        top, left = record.sizes[2:4].tolist()
        placement = Placement(bucket, reference.resized_hw, (top, left))
        place = ImagePlace(reference.file, reference.offset, reference.length, original_hw, placement)
        return place, reference.file, ""
    if catalog is None:
        return None, "", "there is no catalogue that tells where its file is"
    found = catalog.execute(
        """SELECT path, offset, length, payload, original_h, original_w, bucket_h, bucket_w,
            resized_h, resized_w, crop_top, crop_left FROM rows WHERE key = ?""",
        (record.key,),
    ).fetchone()
    if found is None:
        return None, "", "the catalogue does not know it any more"
    path, offset, length, payload, *sizes = found
    if payload != "encode":
        return None, path, "only its latents are known"
    if Bucket(*sizes[2:4]) != bucket:
        return None, path, "its file is of another bucket by now"
    placement = Placement(bucket, (sizes[4], sizes[5]), (sizes[6], sizes[7]))
    return ImagePlace(path, offset, length, (sizes[0], sizes[1]), placement), path, ""


def _decode(data: Path | bytes, place: ImagePlace) -> DecodeResult:
    try:
        image = load_reduced(data, place.original_hw, LEAST_PX)
    except BadImage as error:
        return None, str(error)
    return thumbnail_of_image(image, place.original_hw, place.placement), ""


def _finished(prepared: PreparedSet, pending: _Pending, settled: CaptionRules) -> GalleryImage:
    record, row = pending.record, pending.chosen
    thumbnail, problem = pending.result.result() if pending.result is not None else (None, pending.problem)
    if thumbnail is None and not prepared.holds_images:
        thumbnail = _of_latents(prepared, row)
        problem = problem if thumbnail else f"{problem}, and its latents cannot be read"
    return GalleryImage(
        key=record.key,
        source=row.source or record.key.partition("/")[0],
        bucket=prepared.buckets("train")[row.bucket_index],
        text=compose(record.caption, settled, 0, 0),
        original_hw=(int(record.sizes[0]), int(record.sizes[1])),
        path=pending.path,
        thumbnail=thumbnail,
        problem=printable(problem),
    )


def _of_latents(prepared: PreparedSet, row: ChosenRow) -> Thumbnail | None:
    rows = prepared.read("train", row.bucket_index, np.array([row.row]))
    if not rows.ok[0] or rows.latents is None:
        return None
    return thumbnail_of_latents(rows.latents[0], prepared.scaling_factor)

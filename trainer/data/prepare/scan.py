"""Finding images: from the sources to rows of the catalogue, with size and bucket from each file's header.

Two passes, so that order and result depend on the sources alone: all items go into a scratch table on disk, then they
are looked at in the order of their keys, a page at a time. Files are opened where nothing else tells the size: images
always, latents where the metadata does not name their bucket.
"""

import gc
import os
import sqlite3
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from trainer.data.buckets import Bucket, Placement, make_buckets, place
from trainer.data.captions import WEIGHT_MARK, caption_record
from trainer.data.images import BadImage, has_alpha, image_hw, pillow_rules
from trainer.data.masks import BadMask, check_mask_shape
from trainer.data.prepare.catalog import (
    BadRow,
    CatalogRow,
    FileStamp,
    Payload,
    add_bad,
    add_rows,
    bad_rows,
    open_generation,
    transaction,
)
from trainer.data.prepare.listing_table import add_listed, listed_pages, listing_table
from trainer.data.prepare.settings import PrepareSettings
from trainer.data.sources.folder import read_caption
from trainer.data.sources.listing import list_source, source_names
from trainer.data.sources.source import OWN_MASK, ROW, WHOLE, MaskPlace, SourceItem, open_range, read_bytes
from trainer.data.store.npz import HEAD_BYTES, BadNpz, latents_hw, latents_hw_of_head
from trainer.data.store.shards import LATENT_FACTOR
from trainer.keyed import draw_uniform

_PAGE = 8192
_THREADS = 4
_NEVER = -1
"""File size of a bad row that is to be judged anew each time."""

_Verdict = CatalogRow | BadRow | str


@dataclass
class ScanCounts:
    """What a scan found. Images that are known, changed or removed keep the form in which they were prepared."""

    listed: int = 0
    new: int = 0
    known: int = 0
    changed: int = 0
    removed: int = 0
    bad: int = 0
    ignored: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Known:
    """What the catalogue holds under a key."""

    place: tuple[str, int]
    stamp: FileStamp


class _Previous(NamedTuple):
    """The item before the present one: its key, the first place that was listed under that key, and the last one."""

    key: str
    first: tuple[str, int]
    last: tuple[str, int]


@dataclass(frozen=True)
class _Rules:
    """What decides a row, but for the item."""

    settings: PrepareSettings
    buckets: tuple[Bucket, ...]


def scan(
    connection: sqlite3.Connection,
    prepared: Path,
    settings: PrepareSettings,
    show_progress: bool,
    limit: int | None = None,
) -> ScanCounts:
    """Add all images that the catalogue lacks to its open generation, and all that cannot be used to its bad rows.

    Can be killed at any moment and called again.

    Args:
        limit: look at no more than the first so many items of each source.
    """
    counts = ScanCounts()
    generation = open_generation(connection)
    (rows_before,) = connection.execute("SELECT COUNT(*) FROM rows").fetchone()
    if limit is None:
        _forget_gone(connection)
    rules = settings.buckets
    look = partial(_look, _Rules(settings, make_buckets(rules.resolution, rules.min_px, rules.max_px, rules.step_px)))
    with listing_table(connection, prepared) as scratch, _without_garbage_collector():
        _list_sources(connection, scratch, settings, limit, counts, show_progress)
        bar = tqdm(total=counts.listed, desc="images", unit="img", disable=None if show_progress else True)
        with (
            bar,
            pillow_rules(),
            ThreadPoolExecutor(_THREADS) as pool,
            closing(listed_pages(connection, _PAGE)) as pages,
        ):
            previous = _Previous("", ("", 0), ("", 0))
            for page in pages:
                known, judged, stale = _catalogued(connection, page, previous.key)
                clashes, previous = _clashes(page, known, previous)
                looked = [
                    look(item, clash, known.get(item.key), judged.get((item.key, item.file)), pool)
                    for item, clash in zip(page, clashes, strict=True)
                ]
                found = [result.result() if isinstance(result, Future) else result for result in looked]
                with transaction(connection):
                    connection.executemany("DELETE FROM bad WHERE key = ? AND path = ?", stale)
                    add_rows(connection, generation, [row for row in found if isinstance(row, CatalogRow)])
                    add_bad(connection, [row for row in found if isinstance(row, BadRow)])
                _count(found, counts)
                bar.update(len(page))
    if limit is None:
        connection.execute("DELETE FROM bad WHERE key > ? AND file_bytes != ?", (previous.key, _NEVER))
        counts.removed = rows_before - counts.known - counts.changed
    return counts


def _forget_gone(connection: sqlite3.Connection) -> None:
    """Bad images that will be judged anew are forgotten, because they will be mentioned again; and deleted ones."""
    connection.execute("DELETE FROM bad WHERE file_bytes = ?", (_NEVER,))
    after = ("", "")
    while page := list(islice(bad_rows(connection, after), _PAGE)):
        after = page[-1].key, page[-1].path
        gone = [(row.key, row.path) for row in page if not _exists(row.path)]
        with transaction(connection):
            connection.executemany("DELETE FROM bad WHERE key = ? AND path = ?", gone)


@contextmanager
def _without_garbage_collector() -> Iterator[None]:
    """Millions of tuples come and go here, none of them in cycles: looking for those takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _list_sources(
    connection: sqlite3.Connection,
    scratch: Path,
    settings: PrepareSettings,
    limit: int | None,
    counts: ScanCounts,
    show_progress: bool,
) -> None:
    bar = tqdm(desc="listing", unit="img", disable=None if show_progress else True)
    for source, name in zip(settings.sources, source_names(settings.sources), strict=True):
        items = islice(list_source(source, name, counts.ignored, scratch), limit)
        while page := list(islice(items, _PAGE)):
            bad = [_problem(item) for item in page if item.problem or not _is_text(item)]
            good = [item for item in page if not item.problem and _is_text(item)] if bad else page
            with transaction(connection):
                add_listed(connection, good)
                add_bad(connection, bad)
            counts.listed += len(page)
            counts.bad += len(bad)
            bar.update(len(page))
    bar.close()


def _catalogued(
    connection: sqlite3.Connection, page: list[SourceItem], after: str
) -> tuple[dict[str, _Known], dict[tuple[str, str], tuple[int, int]], list[tuple[str, str]]]:
    """What the catalogue holds of a page whose keys follow the key `after`.

    Returns:
        The rows by key; by key and path the size and time of the files that were judged to be bad; and of the bad, the
        key and path of those that are listed no more.
    """
    last = page[-1].key
    query = "SELECT key, path, offset, file_bytes, mtime_ns, caption_stamp FROM rows WHERE key BETWEEN ? AND ?"
    known = {v[0]: _Known(v[1:3], FileStamp(*v[3:])) for v in connection.execute(query, (page[0].key, last))}
    query = "SELECT key, path, file_bytes, mtime_ns FROM bad WHERE key BETWEEN ? AND ?"
    judged = {v[:2]: v[2:] for v in connection.execute(query, (after, last))}
    listed = {(item.key, item.file) for item in page} if judged else set()
    # The first and the last key may have items on another page.
    stale = [
        place
        for place, (file_bytes, _) in judged.items()
        if file_bytes != _NEVER and after < place[0] < last and place not in listed
    ]
    return known, judged, stale


def _clashes(
    page: list[SourceItem], known: dict[str, _Known], previous: _Previous
) -> tuple[list[str | None], _Previous]:
    """For each listed image why it cannot have its key, which another one has already, or None.

    `previous` is the item before the page; returned anew for the next page.
    """
    key, first, last = previous
    clashes: list[str | None] = []
    for item in page:
        place = (item.file, item.offset)
        is_same = item.key == key
        if not is_same:
            key, first = item.key, place
        owner = known[key].place if key in known else first
        if is_same and place == last:
            clashes.append("is listed more than once; its first entry counts")
        elif (owner[0] != item.file or (key not in known and owner != place)) and _exists(owner[0]):
            clashes.append(f"has the same key as {owner[0]}; rename one of them")
        else:
            clashes.append(None)
        last = place
    return clashes, _Previous(key, first, last)


def _count(found: list[_Verdict], counts: ScanCounts) -> None:
    for result in found:
        if isinstance(result, CatalogRow):
            counts.new += 1
        elif isinstance(result, BadRow) or result == "bad":
            counts.bad += 1
        elif result == "known":
            counts.known += 1
        else:
            counts.changed += 1


def _look(
    rules: _Rules,
    item: SourceItem,
    clash: str | None,
    known: _Known | None,
    judged: tuple[int, int] | None,
    pool: ThreadPoolExecutor,
) -> _Verdict | Future[_Verdict]:
    """Judge one item: a new row, a bad one, or `known`, `changed` or `bad` for what the catalogue has."""
    if clash is not None:
        return BadRow(item.file, item.key, _NEVER, _NEVER, clash)
    if item.file_bytes >= 0 and item.bucket_hw is not None and not item.caption_path:
        return _judge(rules, item, known, judged)
    return pool.submit(_judge, rules, item, known, judged)


def _judge(rules: _Rules, item: SourceItem, known: _Known | None, judged: tuple[int, int] | None) -> _Verdict:
    file_bytes, mtime_ns = item.file_bytes, item.mtime_ns
    try:
        if file_bytes < 0:
            stat = os.stat(item.file)  # noqa: PTH116 - no Path object per image
            file_bytes, mtime_ns = stat.st_size, stat.st_mtime_ns
        if item.mask is not None and item.mask.file and item.mask.length == WHOLE:
            mtime_ns ^= _mtime_ns(item.mask.file)  # an image that is bad by its mask is mended by it
        stamp = FileStamp(file_bytes, mtime_ns, _caption_stamp(item))
        if known is not None:
            return "known" if known.place == (item.file, item.offset) and known.stamp == stamp else "changed"
        if judged == (file_bytes, mtime_ns):
            return "bad"
        return _row(rules, item, stamp)
    except OSError as error:
        return BadRow(item.file, item.key, _NEVER, _NEVER, f"cannot be read: {error.strerror}")
    except (BadImage, BadMask, BadNpz, EOFError, ValueError) as error:
        return BadRow(item.file, item.key, file_bytes, mtime_ns, str(error))


def _row(rules: _Rules, item: SourceItem, stamp: FileStamp) -> CatalogRow:
    settings = rules.settings
    held_out = settings.validation_fraction > 0 and draw_uniform("split", item.key) < settings.validation_fraction
    payload: Payload = "npz"
    mask = item.mask
    if item.kind == "latents":
        if settings.mode == "images":
            raise ValueError("is a file of latents, which data.mode: images does not use")
        if not stamp.file_bytes:
            raise ValueError("is empty")
        placement = _placement_of_latents(item.bucket_hw or _bucket_hw(item))
        original_hw = item.original_hw or _sides(placement.bucket)
    else:
        payload = "image" if settings.mode == "images" else "encode"
        original_hw = item.original_hw if item.length == ROW and item.original_hw else _image_hw(item)
        placement = place(original_hw, rules.buckets, settings.buckets)
        mask = _mask(item, original_hw)
    caption = item.caption or caption_record("").decode()
    return CatalogRow(
        key=item.key,
        path=item.file,
        offset=item.offset,
        length=item.length,
        payload=payload,
        stamp=stamp,
        caption=read_caption(item.caption_path, caption) if item.caption_path else caption,
        repeats=1 if held_out else item.repeats,
        split="validation" if held_out else "train",
        original_hw=original_hw,
        placement=placement,
        mask=mask,
    )


def _mask(item: SourceItem, original_hw: tuple[int, int]) -> MaskPlace | None:
    """Where the mask of an image lies, which is there and of its shape; raises BadMask."""
    mask = item.mask
    if mask is None or ROW in (mask.length, item.length):  # that of a table's row was looked at when it was listed
        return mask
    if mask == OWN_MASK:
        with open_range(item.file, item.offset, item.length) as file:
            return mask if has_alpha(file) else None
    try:
        with open_range(*mask) as file:
            check_mask_shape(image_hw(file), original_hw)
    except BadImage as error:
        raise BadMask(f"its mask {error}") from error
    except OSError as error:
        raise BadMask(f"its mask cannot be read: {error.strerror}") from error
    return mask


def _image_hw(item: SourceItem) -> tuple[int, int]:
    if item.length == WHOLE:
        return image_hw(Path(item.file))
    with open_range(item.file, item.offset, item.length) as file:
        return image_hw(file)


def _exists(path: str) -> bool:
    """Whether the file is there, or where the path is that of a file's column, the file."""
    return os.path.lexists(path) or os.path.lexists(path.rpartition("::")[0])


def _sides(bucket: Bucket) -> tuple[int, int]:
    return bucket.height_px, bucket.width_px


@lru_cache(maxsize=4096)
def _placement_of_latents(bucket_hw: tuple[int, int]) -> Placement:
    """Where the crop lay is told by the `.npz`, when it is read."""
    return Placement(Bucket(*bucket_hw), bucket_hw, (0, 0))


def _bucket_hw(item: SourceItem) -> tuple[int, int]:
    """From the header of the latents, of which a few hundred bytes are read where they stand first in the archive."""
    size = os.stat(item.file).st_size if item.length == WHOLE else item.length  # noqa: PTH116
    hw = latents_hw_of_head(read_bytes(item.file, item.offset, min(size, HEAD_BYTES)))
    height, width = hw or latents_hw(read_bytes(item.file, item.offset, item.length))
    return height * LATENT_FACTOR, width * LATENT_FACTOR


def _caption_stamp(item: SourceItem) -> int:
    """Differs where the caption does, or the image's own loss weight."""
    caption = item.caption or ""
    if not item.caption_path:
        return zlib.crc32(caption.encode())
    return _mtime_ns(item.caption_path) + (zlib.crc32(caption.encode()) if WEIGHT_MARK in caption else 0)


def _mtime_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116
    except OSError:
        return 0


def _is_text(item: SourceItem) -> bool:
    try:
        (item.key + item.file).encode()
    except UnicodeEncodeError:
        return False
    return True


def _problem(item: SourceItem) -> BadRow:
    if _is_text(item):
        return BadRow(item.file, item.key, _NEVER, _NEVER, item.problem)
    path, key = (
        text.encode(errors="surrogateescape").decode(errors="backslashreplace") for text in (item.file, item.key)
    )
    return BadRow(path, key, _NEVER, _NEVER, "its name is not UTF-8; rename it")

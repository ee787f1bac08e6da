"""Finding images: from the sources to rows of the catalogue, with size and bucket from each file's header.

Two passes, so that order and result depend on the files alone: all names go into a scratch table on disk, then they
are looked at in the order of their keys, a page at a time. An image that is known already costs two `stat` calls.
"""

import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from trainer.data.buckets import Bucket, make_buckets, place
from trainer.data.catalog import (
    BadRow,
    CatalogRow,
    FileStamp,
    add_bad,
    add_rows,
    bad_rows,
    open_generation,
    transaction,
)
from trainer.data.images import BadImage, image_hw, pillow_rules
from trainer.data.keyed import draw_uniform
from trainer.data.settings import PrepareSettings
from trainer.data.sources.folder import list_folder, read_caption, source_names
from trainer.data.sources.source import SourceItem

_PAGE = 512
_THREADS = 4
_NEVER = -1
"""File size of a bad row that is to be judged anew each time."""


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
class _Listed:
    """A listed image, and what the catalogue holds under its key and its path."""

    item: SourceItem
    source: int
    known_path: str | None
    known_stamp: FileStamp
    bad_stamp: tuple[int | None, int | None]


def scan(connection: sqlite3.Connection, prepared: Path, settings: PrepareSettings, show_progress: bool) -> ScanCounts:
    """Add all images that the catalogue lacks to its open generation, and all that cannot be used to its bad rows.

    Can be killed at any moment and called again.
    """
    counts = ScanCounts()
    generation = open_generation(connection)
    (rows_before,) = connection.execute("SELECT COUNT(*) FROM rows").fetchone()
    _forget_gone(connection)
    scratch = prepared / "listing.sqlite"
    scratch.unlink(missing_ok=True)
    connection.execute("ATTACH ? AS listing", (str(scratch),))
    try:
        _list_sources(connection, settings, counts)
        rules = settings.buckets
        buckets = make_buckets(rules.resolution, rules.min_px, rules.max_px, rules.step_px)
        look = partial(_look, settings, buckets)
        bar = tqdm(total=counts.listed, desc="images", unit="img", disable=None if show_progress else True)
        with bar, pillow_rules(), ThreadPoolExecutor(_THREADS) as pool:
            previous = ("", "")
            for page in _pages(connection):
                owners, previous = _owners(page, previous)
                found = list(pool.map(look, page, owners))
                with transaction(connection):
                    add_rows(connection, generation, [row for row in found if isinstance(row, CatalogRow)])
                    add_bad(connection, [row for row in found if isinstance(row, BadRow)])
                _count(found, counts)
                bar.update(len(page))
    finally:
        connection.execute("DETACH listing")
        scratch.unlink(missing_ok=True)
    counts.removed = rows_before - counts.known - counts.changed
    return counts


def _forget_gone(connection: sqlite3.Connection) -> None:
    """Bad images that were deleted need no mention."""
    gone = [(row.path,) for row in bad_rows(connection) if not os.path.lexists(row.path)]
    with transaction(connection):
        connection.executemany("DELETE FROM bad WHERE path = ?", gone)


def _list_sources(connection: sqlite3.Connection, settings: PrepareSettings, counts: ScanCounts) -> None:
    connection.execute("PRAGMA listing.journal_mode = OFF")
    connection.execute("PRAGMA listing.synchronous = OFF")
    connection.execute(
        "CREATE TABLE listing.listed (key TEXT, path TEXT, caption_path TEXT, source INTEGER,"
        " PRIMARY KEY (key, path)) WITHOUT ROWID"
    )
    for number, (source, name) in enumerate(zip(settings.sources, source_names(settings.sources), strict=True)):
        items = list_folder(source, name, counts.ignored)
        while page := list(islice(items, _PAGE)):
            good = [item for item in page if _is_text(item.file)]
            bad = [_unnamable(item) for item in page if not _is_text(item.file)]
            with transaction(connection):
                connection.executemany(
                    "INSERT INTO listing.listed VALUES (?, ?, ?, ?)",
                    [(item.key, item.file, item.caption_path, number) for item in good],
                )
                add_bad(connection, bad)
            counts.listed += len(page)
            counts.bad += len(bad)


def _pages(connection: sqlite3.Connection) -> Iterator[list[_Listed]]:
    """The listed images by key and path, a page at a time."""
    query = """SELECT l.key, l.path, l.caption_path, l.source,
            r.path, r.file_bytes, r.mtime_ns, r.caption_mtime_ns, b.file_bytes, b.mtime_ns
        FROM listing.listed l LEFT JOIN rows r ON r.key = l.key LEFT JOIN bad b ON b.path = l.path
        WHERE (l.key, l.path) > (?, ?) ORDER BY l.key, l.path LIMIT ?"""
    after = ("", "")
    while values := connection.execute(query, (*after, _PAGE)).fetchall():
        yield [_Listed(SourceItem(v[0], v[1], caption_path=v[2]), v[3], v[4], FileStamp(*v[5:8]), v[8:10]) for v in values]
        after = values[-1][:2]


def _owners(page: list[_Listed], previous: tuple[str, str]) -> tuple[list[str | None], tuple[str, str]]:
    """For each listed image the path of another that its key belongs to already, or None.

    `previous` is the key before the page and its first path; returned anew for the next page.
    """
    owners: list[str | None] = []
    for listed in page:
        key, path = listed.item.key, listed.item.file
        if key != previous[0]:
            previous = (key, path)
        owner = previous[1] if listed.known_path is None else listed.known_path
        owners.append(owner if owner != path and os.path.lexists(owner) else None)
    return owners, previous


def _count(found: list[CatalogRow | BadRow | str], counts: ScanCounts) -> None:
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
    settings: PrepareSettings, buckets: tuple[Bucket, ...], listed: _Listed, owner: str | None
) -> CatalogRow | BadRow | str:
    """Judge one listed image: a new row, a bad one, or `known`, `changed` or `bad` for what the catalogue has."""
    item = listed.item
    if owner is not None:
        reason = f"has the same key as {owner}; rename one of them"
        return BadRow(item.file, item.key, _NEVER, _NEVER, reason)
    try:
        stat = os.stat(item.file)  # noqa: PTH116 - no Path object per image
    except OSError as error:
        return BadRow(item.file, item.key, _NEVER, _NEVER, f"cannot be read: {error.strerror}")
    stamp = FileStamp(stat.st_size, stat.st_mtime_ns, _mtime_ns(item.caption_path))
    if listed.known_path is not None:
        return "known" if listed.known_path == item.file and listed.known_stamp == stamp else "changed"
    if listed.bad_stamp == (stamp.file_bytes, stamp.mtime_ns):
        return "bad"
    try:
        return _row(settings, buckets, listed, stamp)
    except (BadImage, ValueError) as error:
        return BadRow(item.file, item.key, stamp.file_bytes, stamp.mtime_ns, str(error))


def _row(settings: PrepareSettings, buckets: tuple[Bucket, ...], listed: _Listed, stamp: FileStamp) -> CatalogRow:
    item = listed.item
    original_hw = image_hw(Path(item.file))
    held_out = draw_uniform("split", item.key) < settings.validation_fraction
    return CatalogRow(
        key=item.key,
        path=item.file,
        stamp=stamp,
        caption=read_caption(item.caption_path),
        repeats=1 if held_out else settings.sources[listed.source].repeats,
        split="validation" if held_out else "train",
        original_hw=original_hw,
        placement=place(original_hw, buckets, settings.buckets),
    )


def _mtime_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116
    except OSError:
        return 0


def _is_text(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unnamable(item: SourceItem) -> BadRow:
    path, key = (
        text.encode(errors="surrogateescape").decode(errors="backslashreplace") for text in (item.file, item.key)
    )
    return BadRow(path, key, _NEVER, _NEVER, "its name is not UTF-8; rename it")

"""Finding images: from the sources to rows of the catalogue, with size and bucket from each file's header.

Two passes, so that order and result depend on the sources alone: all items go into a scratch table on disk, then they
are looked at in the order of their keys, a page at a time. Files are opened where nothing else tells the size: images
always, latents where the metadata does not name their bucket.
"""

import gc
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from trainer.data.buckets import make_buckets
from trainer.data.images import pillow_rules
from trainer.data.prepare.catalog import (
    BadRow,
    CatalogRow,
    FileStamp,
    add_bad,
    add_rows,
    bad_rows,
    open_generation,
    transaction,
)
from trainer.data.prepare.judge import NEVER, Known, Rules, Verdict, bad_listed, judge, problem_of_texts
from trainer.data.prepare.listing_table import add_listed, listed_pages, listing_table
from trainer.data.prepare.settings import PrepareSettings
from trainer.data.sources.listing import list_source, source_names
from trainer.data.sources.source import SourceItem

_PAGE = 8192
_THREADS = 4


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


class _Previous(NamedTuple):
    """The item before the present one: its key, the first place that was listed under that key, and the last one."""

    key: str
    first: tuple[str, int]
    last: tuple[str, int]


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
    look = partial(_look, Rules(settings, make_buckets(rules.resolution, rules.min_px, rules.max_px, rules.step_px)))
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
        connection.execute("DELETE FROM bad WHERE key > ? AND file_bytes != ?", (previous.key, NEVER))
        counts.removed = rows_before - counts.known - counts.changed
    return counts


def _forget_gone(connection: sqlite3.Connection) -> None:
    """Bad images that will be judged anew are forgotten, because they will be mentioned again; and deleted ones."""
    connection.execute("DELETE FROM bad WHERE file_bytes = ?", (NEVER,))
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
        items = islice(list_source(source, name, counts.ignored, scratch, settings.limits), limit)
        while page := list(islice(items, _PAGE)):
            problems = [item.problem or problem_of_texts(item, settings.limits) for item in page]
            bad = [bad_listed(item, problem) for item, problem in zip(page, problems, strict=True) if problem]
            good = [item for item, problem in zip(page, problems, strict=True) if not problem] if bad else page
            with transaction(connection):
                add_listed(connection, good)
                add_bad(connection, bad)
            counts.listed += len(page)
            counts.bad += len(bad)
            bar.update(len(page))
    bar.close()


def _catalogued(
    connection: sqlite3.Connection, page: list[SourceItem], after: str
) -> tuple[dict[str, Known], dict[tuple[str, str], tuple[int, int]], list[tuple[str, str]]]:
    """What the catalogue holds of a page whose keys follow the key `after`.

    Returns:
        The rows by key; by key and path the size and time of the files that were judged to be bad; and of the bad, the
        key and path of those that are listed no more.
    """
    last = page[-1].key
    query = "SELECT key, path, offset, file_bytes, mtime_ns, caption_stamp FROM rows WHERE key BETWEEN ? AND ?"
    known = {v[0]: Known(v[1:3], FileStamp(*v[3:])) for v in connection.execute(query, (page[0].key, last))}
    query = "SELECT key, path, file_bytes, mtime_ns FROM bad WHERE key BETWEEN ? AND ?"
    judged = {v[:2]: v[2:] for v in connection.execute(query, (after, last))}
    listed = {(item.key, item.file) for item in page} if judged else set()
    # The first and the last key may have items on another page.
    stale = [
        place
        for place, (file_bytes, _) in judged.items()
        if file_bytes != NEVER and after < place[0] < last and place not in listed
    ]
    return known, judged, stale


def _clashes(
    page: list[SourceItem], known: dict[str, Known], previous: _Previous
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


def _count(found: list[Verdict], counts: ScanCounts) -> None:
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
    rules: Rules,
    item: SourceItem,
    clash: str | None,
    known: Known | None,
    judged: tuple[int, int] | None,
    pool: ThreadPoolExecutor,
) -> Verdict | Future[Verdict]:
    """Judge one item: a new row, a bad one, or `known`, `changed` or `bad` for what the catalogue has."""
    if clash is not None:
        return BadRow(item.file, item.key, NEVER, NEVER, clash)
    if item.file_bytes >= 0 and item.bucket_hw is not None and not item.caption_path:
        return judge(rules, item, known, judged)
    return pool.submit(judge, rules, item, known, judged)


def _exists(path: str) -> bool:
    """Whether the file is there, or where the path is that of a file's column, the file."""
    return os.path.lexists(path) or os.path.lexists(path.rpartition("::")[0])

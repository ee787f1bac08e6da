"""Finding images, and what has changed of those that are known: from the sources to rows of the catalogue.

Two passes, so that order and result depend on the sources alone: all items go into a scratch table on disk, then they
are looked at in the order of their keys, a page at a time. Files are opened where nothing else tells the size: images
always, latents where the metadata does not name their bucket. Of known images only size and time are asked.
"""

import gc
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from tqdm import tqdm

from trainer.config.sections.data.sources import FolderSource, HfSource, Source
from trainer.data.buckets import make_buckets
from trainer.data.catalog.catalog import (
    BadRow,
    CatalogRow,
    FileStamp,
    add_bad,
    add_rows,
    bad_rows,
    open_generation,
    transaction,
)
from trainer.data.catalog.changes import (
    Update,
    apply_updates,
    begin_changes,
    note_vanished,
    recognize,
    set_replaced_aside,
    set_vanished_aside,
    vanished_of,
)
from trainer.data.catalog.filtered import (
    LeftOutBefore,
    begin_filtering,
    count_left_out,
    forget_left_out,
    leave_new_out,
    leave_rows_out,
    left_out_between,
    reword,
)
from trainer.data.catalog.judge import LOST, NEVER, bad_listed, judge, problem_of_texts
from trainer.data.catalog.listing_table import add_listed, listed_pages, listing_table
from trainer.data.catalog.scan_counts import ScanCounts
from trainer.data.catalog.settings import PrepareSettings, moves_of
from trainer.data.catalog.twin_names import forget_longer_keys, tell_twins_apart
from trainer.data.catalog.untouched import found_before, note_look, stamp_of
from trainer.data.catalog.verdicts import Known, KnownLeftOut, LeftOut, Replaced, Rules, StillLeftOut, Verdict
from trainer.data.images import pillow_rules
from trainer.data.sources.listing import is_there, list_source, main_path, sidecars_by_source, source_names
from trainer.data.sources.source import SourceItem
from trainer.errors import UserError

_PAGE = 8192
_THREADS = 4
_MOST_LOST = 0.05

Removed = Literal["ask", "drop", "keep"]
"""Images that are not listed any more go, but more than one, and 5 % of a source's, at once is an error; they go,
however many; or they stay as they were prepared."""


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
    removed: Removed = "ask",
    look_again: bool = False,
) -> ScanCounts:
    """Make the catalogue's rows those of the sources: new ones join its open generation, what cannot be used its bad
    rows, and what is not listed any more goes.

    Can be killed at any moment and called again.

    Args:
        limit: look at no more than the first so many items of each source; nothing is taken for removed.
        removed: what to do about images that are not listed any more.
        look_again: list the sources even if nothing can have changed.

    Raises:
        UserError: a source cannot be read, or more than 5 % of its images have vanished and `removed` is "ask".
    """
    counts = ScanCounts()
    generation = open_generation(connection)
    has_filtered = begin_filtering(connection) or settings.filters.is_on
    stamp = stamp_of(settings) if limit is None and removed == "ask" and not has_filtered else None
    if not look_again and (before := found_before(connection, stamp)) is not None:
        return before
    note_look(connection, None, counts)
    if limit is None:
        _forget_gone(connection)
    begin_changes(connection)
    wish = settings.buckets
    buckets = make_buckets(wish.resolution, wish.min_px, wish.max_px, wish.step_px)
    rules = Rules(settings, buckets, moves_of(settings), sidecars_by_source(settings.sources))
    with listing_table(connection, prepared) as scratch, _without_garbage_collector():
        sources = [source for source in settings.sources if removed == "ask" or _is_there(source)]
        has_endings = _list_sources(connection, scratch, settings, sources, limit, counts, show_progress)
        if any(isinstance(source, FolderSource) for source in sources):
            counts.bad += tell_twins_apart(connection, rules, has_endings)
        last = _walk(connection, rules, generation, counts, has_filtered, show_progress)
    if limit is None:
        connection.execute("DELETE FROM bad WHERE key > ? AND file_bytes != ?", (last, NEVER))
        connection.execute("DELETE FROM filtered WHERE key > ?", (last,))
        after = connection.execute("SELECT key FROM rows WHERE key > ?", (last,))
        while keys := after.fetchmany(_PAGE):
            note_vanished(connection, (key for (key,) in keys))
        _settle(connection, settings, removed, counts)
        forget_longer_keys(connection)
        note_look(connection, stamp, counts)
    counts.filtered = count_left_out(connection) if has_filtered else Counter()
    return counts


def _walk(
    connection: sqlite3.Connection,
    rules: Rules,
    generation: int,
    counts: ScanCounts,
    has_filtered: bool,
    show_progress: bool,
) -> str:
    """Look at all that is listed, by key, beside what the catalogue has; returns the last key."""
    look = partial(_look, rules)
    bar = tqdm(total=counts.listed, desc="images", unit="img", disable=None if show_progress else True)
    with (
        bar,
        pillow_rules(),
        ThreadPoolExecutor(_THREADS) as pool,
        closing(listed_pages(connection, _PAGE)) as pages,
    ):
        previous = _Previous("", ("", 0), ("", 0))
        for page in pages:
            before = previous.key
            known, judged, stale = _catalogued(connection, page, before, rules)
            left_out = left_out_between(connection, before, page[-1].key) if has_filtered else {}
            clashes, previous = _clashes(page, known, previous, rules)
            looked = [
                look(
                    item,
                    clash,
                    known.get(item.key),
                    judged.get((item.key, item.file)),
                    left_out.get(item.key),
                    pool,
                )
                for item, clash in zip(page, clashes, strict=True)
            ]
            found = [result.result() if isinstance(result, Future) else result for result in looked]
            with transaction(connection):
                connection.executemany("DELETE FROM bad WHERE key = ? AND path = ?", stale)
                if left_out:
                    still = {verdict.key for verdict in found if isinstance(verdict, StillLeftOut)}
                    forget_left_out(connection, (key for key in left_out if key > before and key not in still))
                _take_in(connection, generation, found, counts)
            listed = {item.key for item in page}
            note_vanished(connection, (key for key in known if key not in listed and key > before))
            bar.update(len(page))
    return previous.key


def _take_in(connection: sqlite3.Connection, generation: int, found: list[Verdict], counts: ScanCounts) -> None:
    """Write down what has been found of a page, and count it."""
    if all(verdict == "known" for verdict in found):  # as nearly all are of a set that has hardly changed
        counts.known += len(found)
        return
    replaced = [verdict for verdict in found if isinstance(verdict, Replaced)]
    set_replaced_aside(connection, [verdict.key for verdict in replaced])
    replaced = [verdict.by for verdict in replaced]
    rows = [*found, *replaced]
    new = [row for row in rows if isinstance(row, CatalogRow)]
    bad = [row for row in rows if isinstance(row, BadRow)]
    gone = [verdict for verdict in found if isinstance(verdict, KnownLeftOut)]
    updates = [update for update in found if isinstance(update, Update)]
    updates += [verdict.update for verdict in gone if verdict.update is not None]
    add_rows(connection, generation, new)
    add_bad(connection, bad)
    changed = apply_updates(connection, updates)
    leave_rows_out(connection, [(verdict.key, verdict.reason) for verdict in gone])
    leave_new_out(connection, [(verdict.row, verdict.reason) for verdict in rows if isinstance(verdict, LeftOut)])
    still = [verdict for verdict in found if isinstance(verdict, StillLeftOut)]
    reword(connection, [(verdict.key, verdict.reason) for verdict in still if verdict.reason is not None])
    counts.captions += changed["captions"]
    counts.repeats += changed["repeats"]
    counts.moved += changed["moved"]
    counts.changed += sum(isinstance(row, CatalogRow) for row in replaced)
    counts.new += len(new) - sum(isinstance(row, CatalogRow) for row in replaced)
    counts.known += sum(isinstance(verdict, Update) for verdict in found)
    counts.known += sum(verdict == "known" for verdict in found)
    counts.bad += len(bad) + sum(verdict == "bad" for verdict in found)
    for row in (*new, *updates):
        counts.note_foreign(row.foreign)
        counts.note_lossy(row.caption or "", row.path)


def _settle(connection: sqlite3.Connection, settings: PrepareSettings, removed: Removed, counts: ScanCounts) -> None:
    """What becomes of the images that are not listed any more."""
    recognized = recognize(connection, with_captions=settings.text_encoders is not None)
    counts.renamed, counts.back = recognized["renamed"], recognized["back"]
    counts.changed -= recognized["replaced"]
    counts.new -= counts.renamed + counts.back - recognized["replaced"]
    counts.known += counts.renamed + counts.back
    names = source_names(settings.sources)
    lost = vanished_of(connection, names)
    if removed == "keep":
        counts.kept = sum(gone for gone, _, _ in lost.values())
        counts.first_kept = min((first for _, _, first in lost.values()), default="")
        for name in lost:
            connection.execute("DELETE FROM vanished WHERE key > ? AND key < ?", (f"{name}/", f"{name}0"))
    elif removed == "ask":
        for source, name in zip(settings.sources, names, strict=True):
            gone, total, first = lost.get(name, (0, 1, ""))
            if gone > max(1, _MOST_LOST * total) or gone == total:
                raise UserError(
                    f"data.sources ({main_path(source)}): {gone:,} of its {total:,} prepared images are not there any "
                    f"more, such as {first}: is a drive not mounted? If they are meant to go, prepare with "
                    "--drop-removed; to train on them as they were prepared, with --keep-removed"
                )
    counts.removed = set_vanished_aside(connection)


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


def _is_there(source: Source) -> bool:
    return isinstance(source, HfSource) or is_there(main_path(source))


def _list_sources(
    connection: sqlite3.Connection,
    scratch: Path,
    settings: PrepareSettings,
    sources: Sequence[Source],
    limit: int | None,
    counts: ScanCounts,
    show_progress: bool,
) -> bool:
    """Fill the table of what is listed; returns whether any folder has images of more than one ending."""
    has_endings = False
    bar = tqdm(desc="listing", unit="img", disable=None if show_progress else True)
    for source, name in zip(settings.sources, source_names(settings.sources), strict=True):
        if source not in sources:
            continue
        endings: set[str] = set()
        items = islice(list_source(source, name, counts.ignored, scratch, settings.limits), limit)
        while page := list(islice(items, _PAGE)):
            problems = [item.problem or problem_of_texts(item, settings.limits) for item in page]
            bad = [bad_listed(item, problem) for item, problem in zip(page, problems, strict=True) if problem]
            good = [item for item, problem in zip(page, problems, strict=True) if not problem] if bad else page
            with transaction(connection):
                add_listed(connection, good)
                add_bad(connection, bad)
            if isinstance(source, FolderSource):
                endings.update(item.file.rpartition(".")[2] for item in page)
            counts.listed += len(page)
            counts.bad += len(bad)
            for item in page:
                counts.note_foreign(item.foreign)
            bar.update(len(page))
        has_endings |= len(endings) > 1
    bar.close()
    return has_endings


def _catalogued(
    connection: sqlite3.Connection, page: list[SourceItem], after: str, rules: Rules
) -> tuple[dict[str, Known], dict[tuple[str, str], tuple[int, int]], list[tuple[str, str]]]:
    """What the catalogue holds of a page whose keys follow the key `after`.

    Returns:
        The rows by key, those between the pages included; by key and path the size and time of the files that were
        judged to be bad; and of the bad, the key and path of those that are listed no more.
    """
    last = page[-1].key
    query = f"""SELECT key, path, offset, file_bytes, mtime_ns, caption_stamp, payload, repeats, split, content,
        instr(caption, ?) {_filtered_columns(rules)} FROM rows WHERE key BETWEEN ? AND ?"""
    found = connection.execute(query, (LOST, min(after, page[0].key), last))
    if rules.filters.is_on:
        known = {v[0]: Known(v[1:3], FileStamp(*v[3:6]), *(*v[6:11], v[11:13], *v[13:])) for v in found}
    else:
        known = {v[0]: Known(v[1:3], FileStamp(*v[3:6]), *v[6:]) for v in found}
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


def _filtered_columns(rules: Rules) -> str:
    """What filters look at of known images."""
    if not rules.filters.is_on:
        return ""
    return ", original_h, original_w" + (", caption" if rules.filters.reads_records else "")


def _clashes(
    page: list[SourceItem], known: dict[str, Known], previous: _Previous, rules: Rules
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
        elif key in known and rules.is_moved(owner, place):
            clashes.append(None)
        elif (owner[0] != item.file or (key not in known and owner != place)) and _exists(owner[0]):
            clashes.append(f"has the same key as {owner[0]}; rename one of them")
        else:
            clashes.append(None)
        last = place
    return clashes, _Previous(key, first, last)


def _look(
    rules: Rules,
    item: SourceItem,
    clash: str | None,
    known: Known | None,
    judged: tuple[int, int] | None,
    left_out: LeftOutBefore | None,
    pool: ThreadPoolExecutor,
) -> Verdict | Future[Verdict]:
    """Judge one item."""
    if clash is not None:
        return BadRow(item.file, item.key, NEVER, NEVER, clash)
    if item.file_bytes >= 0 and item.bucket_hw is not None and not item.caption_path:
        return judge(rules, item, known, judged, left_out)
    return pool.submit(judge, rules, item, known, judged, left_out)


def _exists(path: str) -> bool:
    """Whether the file is there, or where the path is that of a file's column, the file."""
    return os.path.lexists(path) or os.path.lexists(path.rpartition("::")[0])

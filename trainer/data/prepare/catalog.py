"""The catalogue of `prepare`: every image that was found, on disk in SQLite, and how rows are grouped into shards.

Nothing per image is held in memory: rows are read in pages, and a shard is a range of keys of one index. Rows belong
to a generation, the images that one `prepare` added. Once a generation is planned, neither its rows nor its shards
change.
"""

import sqlite3
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainer.data.buckets import Bucket, Placement
from trainer.data.captions import has_no_text
from trainer.data.sources.source import MaskPlace
from trainer.errors import UserError

CATALOG_FORMAT = 3
REFERENCES_PER_SHARD = 4
"""A shard that only says where the payload lies holds as many times more rows."""
_CACHE_KIB = 32 * 1024
_DAMAGE = (1, 11, 20, 26)
"""SQLite's codes ERROR (no such table or column), CORRUPT, MISMATCH, NOTADB; a full disk is no fault of the file."""

Payload = Literal["encode", "npz", "image", "repack"]
"""What a row's shard is to hold: latents that the VAE gives for an image (`encode`) or that lie in an `.npz`
(`repack`), or only where the `.npz` or the `image` lies."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    key TEXT NOT NULL UNIQUE, path TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    file_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, caption_stamp INTEGER NOT NULL,
    caption TEXT NOT NULL, repeats INTEGER NOT NULL,
    generation INTEGER NOT NULL, split TEXT NOT NULL, bucket_h INTEGER NOT NULL, bucket_w INTEGER NOT NULL,
    payload TEXT NOT NULL,
    original_h INTEGER NOT NULL, original_w INTEGER NOT NULL,
    resized_h INTEGER NOT NULL, resized_w INTEGER NOT NULL,
    crop_top INTEGER NOT NULL, crop_left INTEGER NOT NULL, no_caption INTEGER NOT NULL, mask TEXT);
CREATE INDEX IF NOT EXISTS rows_by_shard ON rows (generation, split, bucket_h, bucket_w, payload, key, no_caption);
CREATE TABLE IF NOT EXISTS bad (
    key TEXT NOT NULL, path TEXT NOT NULL,
    file_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (key, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (
    name TEXT PRIMARY KEY, generation INTEGER NOT NULL, row_generation INTEGER NOT NULL, split TEXT NOT NULL,
    bucket_h INTEGER NOT NULL, bucket_w INTEGER NOT NULL, payload TEXT NOT NULL,
    first_key TEXT NOT NULL, last_key TEXT NOT NULL, rows INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS generations (
    generation INTEGER PRIMARY KEY, committed INTEGER NOT NULL);
"""


_FROM_FORMAT_2 = "ALTER TABLE rows ADD COLUMN mask TEXT;"


class FileStamp(NamedTuple):
    """By which a change is noticed: size and time of the file, the time mixed (xor) with that of a mask's file; and the
    caption file's time (0: none) or the given caption's checksum."""

    file_bytes: int
    mtime_ns: int
    caption_stamp: int


class CatalogRow(NamedTuple):
    """One usable image: caption is a JSON text, original_hw its size as displayed; where it lies is told as in
    `sources.source.SourceItem`."""

    key: str
    path: str
    offset: int
    length: int
    payload: Payload
    stamp: FileStamp
    caption: str
    repeats: int
    split: str
    original_hw: tuple[int, int]
    placement: Placement
    mask: MaskPlace | None = None


@dataclass(frozen=True)
class BadRow:
    """An image that is left out, with the reason; `path` is that of the tar where it lies in one."""

    path: str
    key: str
    file_bytes: int
    mtime_ns: int
    reason: str


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be written: the rows of one generation, split, bucket and kind whose keys lie in first_key..last_key.

    `payload` is what the shard will hold. It is that of the rows, but for a `repack` of rows that are `npz`; then
    `row_generation`, under which the rows were found, is older than `generation`, under which they are written.
    """

    name: str
    generation: int
    row_generation: int
    split: str
    bucket: Bucket
    payload: Payload
    first_key: str
    last_key: str
    rows: int


@contextmanager
def open_catalog(prepared: Path, read_only: bool = False) -> Iterator[sqlite3.Connection]:
    """The catalogue of a prepared folder; made where it is missing, unless `read_only`."""
    path = prepared / "catalog.sqlite"
    uri = f"{path.resolve().as_uri()}?mode={'ro' if read_only else 'rwc'}"
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=60)
    except sqlite3.OperationalError as error:
        raise UserError(f"{path}: {error}") from error
    with closing(connection):
        try:
            # Of a catalogue that somebody else has made, no view or trigger calls a function of SQLite's extensions.
            connection.execute("PRAGMA trusted_schema = OFF")
            _check_format(connection, path, read_only)
            yield connection
        except sqlite3.DatabaseError as error:
            if getattr(error, "sqlite_errorcode", _DAMAGE[0]) & 0xFF not in _DAMAGE:
                raise
            raise UserError(f"{path}: cannot be read ({error}); delete the folder to prepare it anew") from error


def _check_format(connection: sqlite3.Connection, path: Path, read_only: bool) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, CATALOG_FORMAT - 1, CATALOG_FORMAT):
        raise UserError(f"{path}: is of format {version}, this version reads {CATALOG_FORMAT}")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    if not read_only:
        connection.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {CATALOG_FORMAT}; COMMIT;")


def upgrade(connection: sqlite3.Connection) -> None:
    """Give a catalogue of the format before this one its column of masks; others stay as they are."""
    if connection.execute("PRAGMA user_version").fetchone()[0] != CATALOG_FORMAT:
        connection.executescript(f"BEGIN; {_FROM_FORMAT_2} PRAGMA user_version = {CATALOG_FORMAT}; COMMIT;")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def open_generation(connection: sqlite3.Connection) -> int:
    """The generation that new rows join: the one after the last that was planned."""
    (last,) = connection.execute("SELECT COALESCE(MAX(generation), 0) FROM generations").fetchone()
    return last + 1


def add_rows(connection: sqlite3.Connection, generation: int, rows: Sequence[CatalogRow]) -> None:
    """Add usable images to the open generation; what was said of them as bad is forgotten."""
    connection.executemany(
        f"INSERT INTO rows VALUES ({', '.join('?' * 22)})",
        [
            (
                *(row.key, row.path, row.offset, row.length, *row.stamp),
                *(row.caption, row.repeats, generation, row.split),
                *(row.placement.bucket.height_px, row.placement.bucket.width_px, row.payload),
                *row.original_hw,
                *row.placement.resized_hw,
                *row.placement.crop_top_left,
                has_no_text(row.caption),
                None if row.mask is None else row.mask.to_text(),
            )
            for row in rows
        ],
    )
    if connection.execute("SELECT 1 FROM bad LIMIT 1").fetchone():
        connection.executemany("DELETE FROM bad WHERE key = ? AND path = ?", [(row.key, row.path) for row in rows])


def add_bad(connection: sqlite3.Connection, rows: Sequence[BadRow]) -> None:
    """Record images that are left out."""
    connection.executemany(
        "INSERT OR REPLACE INTO bad VALUES (?, ?, ?, ?, ?)",
        [(row.key, row.path, row.file_bytes, row.mtime_ns, row.reason) for row in rows],
    )


def bad_rows(connection: sqlite3.Connection, after: tuple[str, str] = ("", "")) -> Iterator[BadRow]:
    """The images that are left out, by key and path, from behind `after` on."""
    query = """SELECT path, key, file_bytes, mtime_ns, reason FROM bad WHERE (key, path) > (?, ?)
        ORDER BY key, path"""
    for values in connection.execute(query, after):
        yield BadRow(*values)


def count_rows(connection: sqlite3.Connection) -> dict[tuple[str, Bucket], int]:
    """Usable images by split and bucket, of all generations."""
    query = "SELECT split, bucket_h, bucket_w, COUNT(*) FROM rows GROUP BY 1, 2, 3 ORDER BY 1, 2, 3"
    return {(split, Bucket(h, w)): count for split, h, w, count in connection.execute(query)}


def has_open_rows(connection: sqlite3.Connection) -> bool:
    """Whether an interrupted scan left rows that belong to no planned generation."""
    query = "SELECT 1 FROM rows WHERE generation = ? LIMIT 1"
    return connection.execute(query, (open_generation(connection),)).fetchone() is not None


def count_new(connection: sqlite3.Connection) -> tuple[int, int]:
    """Rows of the open generation, and how many of them have an empty caption."""
    query = "SELECT COUNT(*), TOTAL(no_caption) FROM rows WHERE generation = ?"
    rows, empty = connection.execute(query, (open_generation(connection),)).fetchone()
    return rows, int(empty)


def count_new_masks(connection: sqlite3.Connection) -> int:
    """Images of the open generation that have a mask; latents tell it only when they are read."""
    query = "SELECT COUNT(mask) FROM rows WHERE generation = ? AND payload != 'npz'"
    return connection.execute(query, (open_generation(connection),)).fetchone()[0]


def plan_generation(connection: sqlite3.Connection, rows_per_shard: int) -> int:
    """Group the open generation's rows into shards by split, bucket, kind and key, and close it; returns its shards.

    The grouping is a function of the rows alone, so that a plan made after any interruption is the same.
    """
    generation = open_generation(connection)
    query = """SELECT split, bucket_h, bucket_w, payload, key FROM rows WHERE generation = ?
        ORDER BY split, bucket_h, bucket_w, payload, key"""
    shards = []
    names = _ShardNames(generation)
    for group, rows in groupby(connection.execute(query, (generation,)), key=itemgetter(0, 1, 2, 3)):
        size = rows_per_shard * (REFERENCES_PER_SHARD if group[3] in ("npz", "image") else 1)
        keys = map(itemgetter(4), rows)
        while some := list(islice(keys, size)):
            shards.append((names.next(group), generation, generation, *group, some[0], some[-1], len(some)))
    _add_generation(connection, generation, shards)
    return len(shards)


def plan_repack(connection: sqlite3.Connection, rows_per_shard: int) -> int:
    """Plan a generation of shards that hold the latents to which committed shards refer; returns its shards.

    They hold the same rows in the same order, and take the others' place in the next snapshot.
    """
    generation = open_generation(connection)
    shards = []
    names = _ShardNames(generation)
    query = """SELECT s.row_generation, s.split, s.bucket_h, s.bucket_w, s.first_key, s.last_key
        FROM shards s JOIN generations g ON g.generation = s.generation
        WHERE s.payload = 'npz' AND g.committed ORDER BY s.split, s.bucket_h, s.bucket_w, s.generation, s.name"""
    rows_query = """SELECT key FROM rows WHERE generation = ? AND split = ? AND bucket_h = ? AND bucket_w = ?
        AND payload = 'npz' AND key BETWEEN ? AND ? ORDER BY key"""
    for row_generation, split, height, width, *ends in connection.execute(query).fetchall():
        group = (split, height, width)
        keys = (key for (key,) in connection.execute(rows_query, (row_generation, *group, *ends)))
        while some := list(islice(keys, rows_per_shard)):
            name = names.next(group)
            shards.append((name, generation, row_generation, *group, "repack", some[0], some[-1], len(some)))
    _add_generation(connection, generation, shards)
    return len(shards)


class _ShardNames:
    """Names of a generation's shards, numbered within each split and bucket."""

    def __init__(self, generation: int) -> None:
        self._folder = f"shards/{generation:06d}"
        self._counts: Counter[tuple[str, int, int]] = Counter()

    def next(self, group: tuple[Any, ...]) -> str:
        split, height, width = group[:3]
        index = self._counts[split, height, width]
        self._counts[split, height, width] += 1
        return f"{self._folder}/{split}-{height}x{width}-{index:06d}.safetensors"


def _add_generation(connection: sqlite3.Connection, generation: int, shards: Sequence[tuple[Any, ...]]) -> None:
    if shards:
        with transaction(connection):
            connection.executemany("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", shards)
            connection.execute("INSERT INTO generations VALUES (?, 0)", (generation,))


def pending_generations(connection: sqlite3.Connection) -> list[int]:
    """Generations that are planned but in no snapshot yet."""
    query = "SELECT generation FROM generations WHERE NOT committed ORDER BY generation"
    return [generation for (generation,) in connection.execute(query)]


def pending_shards(connection: sqlite3.Connection) -> list[PlannedShard]:
    """The shards of the pending generations, finished or not, in the order of the snapshot."""
    query = """SELECT s.name, s.generation, s.row_generation, s.split, s.bucket_h, s.bucket_w, s.payload,
            s.first_key, s.last_key, s.rows
        FROM shards s JOIN generations g ON g.generation = s.generation WHERE NOT g.committed
        ORDER BY s.generation, s.name"""
    return [
        PlannedShard(name, generation, row_generation, split, Bucket(height, width), payload, first, last, rows)
        for name, generation, row_generation, split, height, width, payload, first, last, rows in connection.execute(
            query
        )
    ]


def rows_of_shard(connection: sqlite3.Connection, shard: PlannedShard) -> list[CatalogRow]:
    """The rows of one shard, by key."""
    query = """SELECT key, path, offset, length, payload, file_bytes, mtime_ns, caption_stamp, caption, repeats, split,
            original_h, original_w, resized_h, resized_w, crop_top, crop_left, mask
        FROM rows WHERE generation = ? AND split = ? AND bucket_h = ? AND bucket_w = ? AND payload = ?
            AND key BETWEEN ? AND ?
        ORDER BY key"""
    bucket = shard.bucket
    payload = "npz" if shard.payload == "repack" else shard.payload
    group = (shard.row_generation, shard.split, bucket.height_px, bucket.width_px, payload)
    placement = lru_cache(64)(lambda *sides: Placement(bucket, sides[:2], sides[2:]))
    return [
        CatalogRow._make(
            (
                *(*values[:5], FileStamp(*values[5:8]), *values[8:11], values[11:13], placement(*values[13:17])),
                None if values[17] is None else MaskPlace.from_text(values[17]),
            )
        )
        for values in connection.execute(query, (*group, shard.first_key, shard.last_key))
    ]


def replaced_shards(connection: sqlite3.Connection) -> set[str]:
    """Names of committed shards whose rows are held by the pending generations as well."""
    query = """SELECT DISTINCT old.name FROM shards new JOIN generations g ON g.generation = new.generation
        JOIN shards old ON old.row_generation = new.row_generation AND old.payload = 'npz' AND old.split = new.split
            AND old.bucket_h = new.bucket_h AND old.bucket_w = new.bucket_w
            AND new.first_key BETWEEN old.first_key AND old.last_key
        WHERE new.payload = 'repack' AND NOT g.committed"""
    return {name for (name,) in connection.execute(query)}


def mark_committed(
    connection: sqlite3.Connection,
    generations: Sequence[int],
    excluded: Sequence[BadRow],
    replaced: Collection[str] = (),
) -> None:
    """The generations are in a snapshot; images that could not be encoded move from the rows to the bad.

    Shards that were `replaced` are of the past: they are not planned to be replaced once more.
    """
    add_bad(connection, excluded)
    connection.executemany("DELETE FROM rows WHERE key = ? AND path = ?", [(row.key, row.path) for row in excluded])
    connection.executemany("DELETE FROM shards WHERE name = ?", [(name,) for name in sorted(replaced)])
    connection.executemany("UPDATE generations SET committed = 1 WHERE generation = ?", [(g,) for g in generations])


def forget_open_rows(connection: sqlite3.Connection) -> None:
    """The sources were never looked at, but for what is planned."""
    with transaction(connection):
        connection.execute("DELETE FROM rows WHERE generation = ?", (open_generation(connection),))
        connection.execute("DELETE FROM bad")


def forget_generation(connection: sqlite3.Connection, generation: int) -> None:
    """Its rows and shards were never planned; only for one of which no shard has been written."""
    with transaction(connection):
        for table in ("rows", "shards", "generations"):
            connection.execute(f"DELETE FROM {table} WHERE generation = ?", (generation,))

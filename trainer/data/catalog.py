"""The catalogue of `prepare`: every image that was found, on disk in SQLite, and how rows are grouped into shards.

Nothing per image is held in memory: rows are read in pages, and a shard is a range of keys of one index. Rows belong
to a generation, the images that one `prepare` added. Once a generation is planned, neither its rows nor its shards
change.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.data.buckets import Bucket, Placement
from trainer.data.captions import caption_record
from trainer.errors import UserError

CATALOG_FORMAT = 1

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rows (
    key TEXT NOT NULL UNIQUE, path TEXT NOT NULL,
    file_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, caption_mtime_ns INTEGER NOT NULL,
    caption TEXT NOT NULL, repeats INTEGER NOT NULL,
    generation INTEGER NOT NULL, split TEXT NOT NULL, bucket_h INTEGER NOT NULL, bucket_w INTEGER NOT NULL,
    original_h INTEGER NOT NULL, original_w INTEGER NOT NULL,
    resized_h INTEGER NOT NULL, resized_w INTEGER NOT NULL,
    crop_top INTEGER NOT NULL, crop_left INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS rows_by_shard ON rows (generation, split, bucket_h, bucket_w, key);
CREATE TABLE IF NOT EXISTS bad (
    path TEXT PRIMARY KEY, key TEXT NOT NULL,
    file_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, reason TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (
    name TEXT PRIMARY KEY, generation INTEGER NOT NULL, split TEXT NOT NULL,
    bucket_h INTEGER NOT NULL, bucket_w INTEGER NOT NULL,
    first_key TEXT NOT NULL, last_key TEXT NOT NULL, rows INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS generations (
    generation INTEGER PRIMARY KEY, committed INTEGER NOT NULL);
"""


@dataclass(frozen=True)
class FileStamp:
    """Size and time of an image file, and the time of its caption file (0: none): whether they are what they were."""

    file_bytes: int
    mtime_ns: int
    caption_mtime_ns: int


@dataclass(frozen=True)
class CatalogRow:
    """One usable image: caption is a JSON text, original_hw its size as displayed."""

    key: str
    path: str
    stamp: FileStamp
    caption: str
    repeats: int
    split: str
    original_hw: tuple[int, int]
    placement: Placement


@dataclass(frozen=True)
class BadRow:
    """An image that is left out, with the reason."""

    path: str
    key: str
    file_bytes: int
    mtime_ns: int
    reason: str


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be written: the rows of one generation, split and bucket whose keys lie in first_key..last_key."""

    name: str
    generation: int
    split: str
    bucket: Bucket
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
            _check_format(connection, path, read_only)
        except sqlite3.DatabaseError as error:
            raise UserError(f"{path}: cannot be read ({error}); delete the folder to prepare it anew") from error
        yield connection


def _check_format(connection: sqlite3.Connection, path: Path, read_only: bool) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, CATALOG_FORMAT):
        raise UserError(f"{path}: is of format {version}, this version reads {CATALOG_FORMAT}")
    if not read_only:
        connection.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {CATALOG_FORMAT}; COMMIT;")


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
        f"INSERT INTO rows VALUES ({', '.join('?' * 17)})",
        [
            (
                *(row.key, row.path, row.stamp.file_bytes, row.stamp.mtime_ns, row.stamp.caption_mtime_ns),
                *(row.caption, row.repeats, generation, row.split),
                *(row.placement.bucket.height_px, row.placement.bucket.width_px),
                *row.original_hw,
                *row.placement.resized_hw,
                *row.placement.crop_top_left,
            )
            for row in rows
        ],
    )
    connection.executemany("DELETE FROM bad WHERE path = ?", [(row.path,) for row in rows])


def add_bad(connection: sqlite3.Connection, rows: Sequence[BadRow]) -> None:
    """Record images that are left out."""
    connection.executemany(
        "INSERT OR REPLACE INTO bad VALUES (?, ?, ?, ?, ?)",
        [(row.path, row.key, row.file_bytes, row.mtime_ns, row.reason) for row in rows],
    )


def bad_rows(connection: sqlite3.Connection) -> Iterator[BadRow]:
    """All images that are left out, by path."""
    for values in connection.execute("SELECT path, key, file_bytes, mtime_ns, reason FROM bad ORDER BY path"):
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
    query = "SELECT COUNT(*), TOTAL(caption = ?) FROM rows WHERE generation = ?"
    rows, empty = connection.execute(query, (caption_record("").decode(), open_generation(connection))).fetchone()
    return rows, int(empty)


def plan_generation(connection: sqlite3.Connection, rows_per_shard: int) -> int:
    """Group the open generation's rows into shards by split, bucket and key, and close it; returns its shards.

    The grouping is a function of the rows alone, so that a plan made after any interruption is the same.
    """
    generation = open_generation(connection)
    query = "SELECT split, bucket_h, bucket_w, key FROM rows WHERE generation = ? ORDER BY 1, 2, 3, 4"
    shards: list[tuple[object, ...]] = []
    group: tuple[str, int, int] | None = None
    index = count = 0
    first = last = ""

    def close() -> None:
        if group is not None and count:
            split, height, width = group
            name = f"shards/{generation:06d}/{split}-{height}x{width}-{index:06d}.safetensors"
            shards.append((name, generation, *group, first, last, count))

    for split, height, width, key in connection.execute(query, (generation,)):
        if (split, height, width) != group or count == rows_per_shard:
            close()
            index = index + 1 if (split, height, width) == group else 0
            group, first, count = (split, height, width), key, 0
        last = key
        count += 1
    close()
    if shards:
        with transaction(connection):
            connection.executemany("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?)", shards)
            connection.execute("INSERT INTO generations VALUES (?, 0)", (generation,))
    return len(shards)


def pending_generations(connection: sqlite3.Connection) -> list[int]:
    """Generations that are planned but in no snapshot yet."""
    query = "SELECT generation FROM generations WHERE NOT committed ORDER BY generation"
    return [generation for (generation,) in connection.execute(query)]


def pending_shards(connection: sqlite3.Connection) -> list[PlannedShard]:
    """The shards of the pending generations, finished or not, in the order of the snapshot."""
    query = """SELECT s.name, s.generation, s.split, s.bucket_h, s.bucket_w, s.first_key, s.last_key, s.rows
        FROM shards s JOIN generations g ON g.generation = s.generation WHERE NOT g.committed
        ORDER BY s.generation, s.name"""
    return [
        PlannedShard(name, generation, split, Bucket(height, width), first, last, rows)
        for name, generation, split, height, width, first, last, rows in connection.execute(query)
    ]


def rows_of_shard(connection: sqlite3.Connection, shard: PlannedShard) -> list[CatalogRow]:
    """The rows of one shard, by key."""
    query = """SELECT key, path, file_bytes, mtime_ns, caption_mtime_ns, caption, repeats, split,
            original_h, original_w, resized_h, resized_w, crop_top, crop_left
        FROM rows WHERE generation = ? AND split = ? AND bucket_h = ? AND bucket_w = ? AND key BETWEEN ? AND ?
        ORDER BY key"""
    bucket = shard.bucket
    keys = (shard.generation, shard.split, bucket.height_px, bucket.width_px, shard.first_key, shard.last_key)
    return [
        CatalogRow(
            key=values[0],
            path=values[1],
            stamp=FileStamp(*values[2:5]),
            caption=values[5],
            repeats=values[6],
            split=values[7],
            original_hw=values[8:10],
            placement=Placement(bucket, values[10:12], values[12:14]),
        )
        for values in connection.execute(query, keys)
    ]


def mark_committed(connection: sqlite3.Connection, generations: Sequence[int], excluded: Sequence[BadRow]) -> None:
    """The generations are in a snapshot; images that could not be encoded move from the rows to the bad."""
    add_bad(connection, excluded)
    connection.executemany("DELETE FROM rows WHERE key = ? AND path = ?", [(row.key, row.path) for row in excluded])
    connection.executemany("UPDATE generations SET committed = 1 WHERE generation = ?", [(g,) for g in generations])


def forget_generation(connection: sqlite3.Connection, generation: int) -> None:
    """Its rows and shards were never planned; only for one of which no shard has been written."""
    with transaction(connection):
        for table in ("rows", "shards", "generations"):
            connection.execute(f"DELETE FROM {table} WHERE generation = ?", (generation,))

"""The catalogue of `prepare`: every image that the next snapshot is to have, on disk in SQLite.

Nothing per image is held in memory: rows are read in pages, and a shard is a range of keys of one index. Rows belong
to a generation, the images that one `prepare` added, and are found in its shards under the key that they had then
(`stored_key`, where it is another one now). Captions, keys and repeats of a row may change, and it may go; what that
means for its shard, whose name is in `dirty` until then, the next commit finds by comparing the two.

What is gone, but still stored, is in `removed`, from where it comes back with the same content.

A row's bucket is that of the main resolution. The same range of rows may be held by shards of other resolutions
(`data.buckets.also_at`) in buckets of their own.
"""

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from trainer.data.buckets import Bucket, Placement
from trainer.data.captions import has_no_text
from trainer.data.sources.source import ForeignText, MaskPlace
from trainer.errors import UserError

CATALOG_FORMAT = 5
_CACHE_KIB = 32 * 1024
_DAMAGE = (1, 11, 20, 26)
"""SQLite's codes ERROR (no such table or column), CORRUPT, MISMATCH, NOTADB; a full disk is no fault of the file."""
# By their words: Python 3.10 does not tell the code.
FULL, _DISK_FAILS, _LOCKED = "database or disk is full", "disk I/O error", "database is locked"

Payload = Literal["encode", "npz", "image", "repack", "copy"]
"""What a row's shard is to hold: latents that the VAE gives for an image (`encode`), that lie in an `.npz` (`repack`)
or in another shard (`copy`), or only where the `.npz` or the `image` lies."""

ROW = """
    path TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL,
    file_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, caption_stamp INTEGER NOT NULL,
    caption TEXT NOT NULL, repeats INTEGER NOT NULL,
    generation INTEGER NOT NULL, split TEXT NOT NULL, bucket_h INTEGER NOT NULL, bucket_w INTEGER NOT NULL,
    payload TEXT NOT NULL,
    original_h INTEGER NOT NULL, original_w INTEGER NOT NULL,
    resized_h INTEGER NOT NULL, resized_w INTEGER NOT NULL,
    crop_top INTEGER NOT NULL, crop_left INTEGER NOT NULL, no_caption INTEGER NOT NULL, mask TEXT,
    content INTEGER, stored_key TEXT"""
"""The columns of a row beside its key."""
_SINCE_FORMAT_4 = f"""
CREATE INDEX IF NOT EXISTS renamed_by_shard ON rows (generation, split, bucket_h, bucket_w, payload, stored_key)
    WHERE stored_key IS NOT NULL;
CREATE TABLE IF NOT EXISTS removed (key TEXT NOT NULL, {ROW}, reason TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS removed_by_key ON removed (key);
CREATE INDEX IF NOT EXISTS removed_by_content ON removed (content);
CREATE TABLE IF NOT EXISTS dirty (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS shards_by_rows ON shards (row_generation, split, bucket_h, bucket_w, first_key);
"""
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS rows (key TEXT NOT NULL UNIQUE, {ROW});
CREATE INDEX IF NOT EXISTS rows_by_shard ON rows (generation, split, bucket_h, bucket_w, payload, key, no_caption);
CREATE TABLE IF NOT EXISTS bad (
    key TEXT NOT NULL, path TEXT NOT NULL,
    file_bytes INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, reason TEXT NOT NULL,
    PRIMARY KEY (key, path)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS shards (
    name TEXT PRIMARY KEY, generation INTEGER NOT NULL, row_generation INTEGER NOT NULL, split TEXT NOT NULL,
    bucket_h INTEGER NOT NULL, bucket_w INTEGER NOT NULL, payload TEXT NOT NULL,
    first_key TEXT NOT NULL, last_key TEXT NOT NULL, rows INTEGER NOT NULL,
    resolution INTEGER NOT NULL DEFAULT 0, held_h INTEGER, held_w INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS generations (
    generation INTEGER PRIMARY KEY, committed INTEGER NOT NULL);
{_SINCE_FORMAT_4}"""
_UPGRADES = {
    2: "ALTER TABLE rows ADD COLUMN mask TEXT;",
    3: f"ALTER TABLE rows ADD COLUMN content INTEGER; ALTER TABLE rows ADD COLUMN stored_key TEXT; {_SINCE_FORMAT_4}",
    4: "ALTER TABLE shards ADD COLUMN resolution INTEGER NOT NULL DEFAULT 0; "
    "ALTER TABLE shards ADD COLUMN held_h INTEGER; ALTER TABLE shards ADD COLUMN held_w INTEGER;",
}
"""From each older format to the next."""


class FileStamp(NamedTuple):
    """By which a change is noticed: size and time of the file, the time mixed (xor) with that of a mask's file; and the
    caption file's time (0: none) or the given caption's checksum."""

    file_bytes: int
    mtime_ns: int
    caption_stamp: int


class CatalogRow(NamedTuple):
    """One usable image: caption is a JSON text, original_hw its size as displayed; where it lies is told as in
    `sources.source.SourceItem`. `content` is a checksum of the file's bytes, by which it is recognized under another
    name, if there is one; `stored_key` the key under which its shard has it, if that is another."""

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
    content: int | None = None
    stored_key: str | None = None
    foreign: ForeignText | None = None
    """That a file of its caption is not UTF-8; told, not kept."""

    @property
    def key_in_shard(self) -> str:
        """Under which its shard has it."""
        return self.key if self.stored_key is None else self.stored_key


@dataclass(frozen=True)
class BadRow:
    """An image that is left out, with the reason; `path` is that of the tar where it lies in one."""

    path: str
    key: str
    file_bytes: int
    mtime_ns: int
    reason: str


class NoRoom(UserError):
    """The disk under a catalogue is full."""


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
            if str(error) == FULL:
                raise NoRoom(
                    f"{path}: {error}; for a while it takes three times its size on that disk. Make room and give the "
                    "same command again: it goes on from what is there"
                ) from error
            if str(error) == _DISK_FAILS:
                raise UserError(
                    f"{path}: {error}; the disk does not read or write (see `dmesg`), or a quota is used up. "
                    "The same command goes on from what is there"
                ) from error
            if str(error) == _LOCKED:
                raise UserError(
                    f"{path}: another command has worked on it for longer than a minute; try again when that has ended"
                ) from error
            if getattr(error, "sqlite_errorcode", _DAMAGE[0]) & 0xFF not in _DAMAGE:
                raise
            raise UserError(f"{path}: cannot be read ({error}); delete the folder to prepare it anew") from error


def _check_format(connection: sqlite3.Connection, path: Path, read_only: bool) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version not in (0, *_UPGRADES, CATALOG_FORMAT):
        raise UserError(f"{path}: is of format {version}, this version reads {CATALOG_FORMAT}")
    connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
    if not read_only:
        connection.execute("PRAGMA synchronous = NORMAL")
        if version == 0:
            connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {CATALOG_FORMAT}; COMMIT;")


def upgrade(connection: sqlite3.Connection) -> None:
    """Give a catalogue of an older format what it lacks; others stay as they are."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    for step in range(version, CATALOG_FORMAT):
        connection.executescript(f"BEGIN; {_UPGRADES[step]} PRAGMA user_version = {step + 1}; COMMIT;")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """All of it or nothing."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:  # a full disk has ended it already
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
        f"INSERT INTO rows VALUES ({', '.join('?' * 24)})",
        [row_values(row, generation) for row in rows],
    )
    if connection.execute("SELECT 1 FROM bad LIMIT 1").fetchone():
        connection.executemany("DELETE FROM bad WHERE key = ? AND path = ?", [(row.key, row.path) for row in rows])


def row_values(row: CatalogRow, generation: int) -> tuple[Any, ...]:
    """A row as a table holds it: its key, then `ROW`."""
    return (
        *(row.key, row.path, row.offset, row.length, *row.stamp),
        *(row.caption, row.repeats, generation, row.split),
        *(row.placement.bucket.height_px, row.placement.bucket.width_px, row.payload),
        *row.original_hw,
        *row.placement.resized_hw,
        *row.placement.crop_top_left,
        has_no_text(row.caption),
        None if row.mask is None else row.mask.to_text(),
        row.content,
        row.stored_key,
    )


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


def forget_open_rows(connection: sqlite3.Connection) -> None:
    """The sources were never looked at, but for what is planned."""
    with transaction(connection):
        connection.execute("DELETE FROM rows WHERE generation = ?", (open_generation(connection),))
        connection.execute("DELETE FROM bad")
        connection.execute("DROP TABLE IF EXISTS looked_through")

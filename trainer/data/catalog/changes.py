"""What changes of rows that the catalogue has: captions, repeats, places; which go, and which come back.

Nothing that is encoded is touched. A row that goes is set aside in `removed`; an image with the same content that is
found later, under whatever name, takes its place in the shard again. Each function marks the shards that it concerns.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from trainer.data.captions import has_no_text
from trainer.data.catalog.catalog import FileStamp, open_generation, transaction
from trainer.data.sources.source import ForeignText, MaskPlace

_REPLACED = "replaced by another image"
_REMOVED = "removed"

_IN_SHARD = """INSERT OR IGNORE INTO dirty SELECT s.name FROM {rows} r JOIN shards s
    ON s.row_generation = r.generation AND s.split = r.split AND s.bucket_h = r.bucket_h AND s.bucket_w = r.bucket_w
    AND s.first_key <= IFNULL(r.stored_key, r.key) AND s.last_key >= IFNULL(r.stored_key, r.key)
    AND CASE s.payload WHEN 'repack' THEN 'npz' WHEN 'copy' THEN 'encode' ELSE s.payload END = r.payload
    WHERE {which}"""
_COLUMNS = """path, offset, length, file_bytes, mtime_ns, caption_stamp, caption, repeats, generation, split,
    bucket_h, bucket_w, payload, original_h, original_w, resized_h, resized_w, crop_top, crop_left, no_caption, mask,
    content"""


class Update(NamedTuple):
    """What the sources say now of an image that the catalogue has, whose pixels are what they were."""

    key: str
    path: str
    offset: int
    length: int
    stamp: FileStamp
    repeats: int
    mask: MaskPlace | None
    """Where that of a file of its own lies; None: as it was."""
    content: int | None
    caption: str | None
    """None: as it was."""
    foreign: ForeignText | None = None
    """That a file of this caption is not UTF-8."""


def apply_updates(connection: sqlite3.Connection, updates: Sequence[Update]) -> Counter[str]:
    """Carry them out; counts those whose `captions` and `repeats` are others now, and those that are `moved`."""
    counts: Counter[str] = Counter()
    for update in updates:
        query = "SELECT path, offset, caption, repeats FROM rows WHERE key = ?"
        path, offset, caption, repeats = connection.execute(query, (update.key,)).fetchone()
        edited = update.caption is not None and update.caption != caption
        counts["captions"] += edited
        counts["repeats"] += update.repeats != repeats
        counts["moved"] += (path, offset) != (update.path, update.offset)
        text = caption if update.caption is None else update.caption
        connection.execute(
            """UPDATE rows SET path = ?, offset = ?, length = ?, file_bytes = ?, mtime_ns = ?, caption_stamp = ?,
                caption = ?, no_caption = ?, repeats = ?, mask = IFNULL(?, mask), content = ? WHERE key = ?""",
            (
                *(update.path, update.offset, update.length, *update.stamp, text, has_no_text(text), update.repeats),
                *(update.mask and update.mask.to_text(), update.content, update.key),
            ),
        )
        if edited or update.repeats != repeats:
            _mark_shards_of(connection, [update.key])
    return counts


def _mark_shards_of(connection: sqlite3.Connection, keys: Iterable[str]) -> None:
    connection.executemany(_IN_SHARD.format(rows="rows", which="r.key = ?"), [(key,) for key in keys])


def set_aside(connection: sqlite3.Connection, keys: Sequence[str], reason: str) -> None:
    """These rows are in the next snapshot no more."""
    _mark_shards_of(connection, keys)
    values = [(reason, key) for key in keys]
    # What is in no snapshot yet may not have been encoded.
    is_stored = "generation IN (SELECT generation FROM generations WHERE committed)"
    connection.executemany(
        f"""INSERT INTO removed SELECT key, {_COLUMNS}, IFNULL(stored_key, key), ? FROM rows
            WHERE key = ? AND {is_stored}""",
        values,
    )
    connection.executemany("DELETE FROM rows WHERE key = ?", [(key,) for key in keys])


def begin_changes(connection: sqlite3.Connection) -> None:
    """Nothing has vanished yet, and nothing was replaced."""
    for table in ("vanished", "replaced"):
        connection.execute(f"DROP TABLE IF EXISTS temp.{table}")
        connection.execute(f"CREATE TEMP TABLE {table} (key TEXT PRIMARY KEY) WITHOUT ROWID")


def note_vanished(connection: sqlite3.Connection, keys: Iterable[str]) -> None:
    """These rows are not listed any more."""
    connection.executemany("INSERT OR IGNORE INTO vanished VALUES (?)", [(key,) for key in keys])


def set_replaced_aside(connection: sqlite3.Connection, keys: Sequence[str]) -> None:
    """These rows give way to others of the same key."""
    set_aside(connection, keys, _REPLACED)
    connection.executemany("INSERT OR IGNORE INTO replaced VALUES (?)", [(key,) for key in keys])


@dataclass(frozen=True)
class _Twin:
    """A new image and the stored one that it is by its content."""

    new_key: str
    old_rowid: int
    vanished: bool
    """Whether that one is among the rows that are not listed any more; else it had been set aside before."""


def recognize(connection: sqlite3.Connection, with_captions: bool) -> Counter[str]:
    """Give new images the rows of those that have vanished, or had been set aside, with the same content.

    Args:
        with_captions: only if the caption is the same as well, because more than the image is stored.

    Returns:
        How many were `renamed` and how many are `back`; how many of these were taken for `replaced`.
    """
    counts: Counter[str] = Counter()
    generation = open_generation(connection)
    if not connection.execute("SELECT 1 FROM removed UNION ALL SELECT 1 FROM vanished LIMIT 1").fetchone():
        return counts
    connection.executescript(
        """DROP TABLE IF EXISTS temp.candidates;
        CREATE TEMP TABLE candidates AS
            SELECT r.content AS content, r.caption AS caption, r.rowid AS old_rowid, 1 AS vanished
            FROM vanished v JOIN rows r ON r.key = v.key WHERE r.content IS NOT NULL;
        CREATE INDEX temp.candidates_by_content ON candidates (content);"""
    )
    new = """SELECT key, content, caption FROM rows WHERE generation = ? AND content IS NOT NULL
        AND (content IN (SELECT content FROM candidates) OR content IN (SELECT content FROM removed)) ORDER BY key"""
    replaced = "SELECT 1 FROM replaced WHERE key = ?"
    for key, content, caption in connection.execute(new, (generation,)).fetchall():
        same = "AND caption = ?2" if with_captions else "AND ?2 IS NOT NULL"
        query = f"""SELECT old_rowid, vanished, '' FROM candidates WHERE content = ?1 {same}
            UNION ALL SELECT rowid, 0, key FROM removed WHERE content = ?1 {same} ORDER BY 2 DESC, 1 LIMIT 1"""
        found = connection.execute(query, (content, caption)).fetchone()
        if found is None:
            continue
        twin = _Twin(key, found[0], bool(found[1]))
        _take_place(connection, twin)
        of_now = twin.vanished or (found[2] != key and connection.execute(replaced, (found[2],)).fetchone())
        counts["renamed" if of_now else "back"] += 1
        counts["replaced"] += connection.execute(replaced, (key,)).fetchone() is not None
    return counts


def _take_place(connection: sqlite3.Connection, twin: _Twin) -> None:
    """The stored row gets the new one's key, caption, place and repeats; the new one, which is not stored yet, goes."""
    said = "path, offset, length, file_bytes, mtime_ns, caption_stamp, caption, no_caption, repeats, mask"
    values = connection.execute(f"SELECT {said} FROM rows WHERE key = ?", (twin.new_key,)).fetchone()
    assignments = ", ".join(f"{name} = ?" for name in said.split(", "))
    with transaction(connection):
        connection.execute("DELETE FROM rows WHERE key = ?", (twin.new_key,))
        if twin.vanished:
            (old_key,) = connection.execute("SELECT key FROM rows WHERE rowid = ?", (twin.old_rowid,)).fetchone()
            connection.execute("DELETE FROM vanished WHERE key = ?", (old_key,))
            connection.execute("DELETE FROM candidates WHERE old_rowid = ?", (twin.old_rowid,))
            connection.execute(
                "UPDATE rows SET stored_key = NULLIF(IFNULL(stored_key, key), ?1), key = ?1 WHERE rowid = ?2",
                (twin.new_key, twin.old_rowid),
            )
        else:
            connection.execute(
                f"""INSERT INTO rows SELECT ?1, {_COLUMNS}, NULLIF(stored_key, ?1) FROM removed WHERE rowid = ?2""",
                (twin.new_key, twin.old_rowid),
            )
            connection.execute("DELETE FROM removed WHERE rowid = ?", (twin.old_rowid,))
        connection.execute(f"UPDATE rows SET {assignments} WHERE key = ?", (*values, twin.new_key))
        connection.execute("UPDATE rows SET repeats = 1 WHERE key = ? AND split = 'validation'", (twin.new_key,))
        _mark_shards_of(connection, [twin.new_key])


def vanished_of(connection: sqlite3.Connection, names: Iterable[str]) -> dict[str, tuple[int, int, str]]:
    """For each source of these names that has lost images: how many, of how many, and the first one's path.

    What is listed, but cannot be used any more, is not lost.
    """
    found = {}
    for name in names:
        ends = (f"{name}/", f"{name}0")  # "0" follows "/"
        query = """SELECT COUNT(*), MIN(r.path) FROM vanished v JOIN rows r ON r.key = v.key
            WHERE v.key > ? AND v.key < ? AND NOT EXISTS (SELECT 1 FROM bad b WHERE b.key = v.key)"""
        lost, first = connection.execute(query, ends).fetchone()
        if lost:
            (all_of_it,) = connection.execute("SELECT COUNT(*) FROM rows WHERE key > ? AND key < ?", ends).fetchone()
            found[name] = lost, all_of_it, first
    return found


def set_vanished_aside(connection: sqlite3.Connection, page: int = 8192) -> int:
    """Set all aside that are not listed any more; returns how many, but for what cannot be used any more."""
    bad = "SELECT COUNT(*) FROM vanished v WHERE EXISTS (SELECT 1 FROM bad b WHERE b.key = v.key)"
    count = -connection.execute(bad).fetchone()[0]
    while keys := [key for (key,) in connection.execute("SELECT key FROM vanished LIMIT ?", (page,))]:
        with transaction(connection):
            set_aside(connection, keys, _REMOVED)
        connection.executemany("DELETE FROM vanished WHERE key = ?", [(key,) for key in keys])
        count += len(keys)
    return count

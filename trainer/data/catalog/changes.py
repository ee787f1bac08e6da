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

_PAGE = 8192
_ARRIVALS = """SELECT a.key, r.content, r.caption FROM arrivals a JOIN rows r ON r.key = a.key
    WHERE a.rowid > ? AND a.rowid <= ? ORDER BY a.rowid"""
_SAME_PLACE = """r.key = rows.key AND r.content IS NULL AND r.payload = 'encode' AND rows.payload = 'encode'
    AND r.path = rows.path AND r.offset = rows.offset AND r.length = rows.length
    AND r.file_bytes = rows.file_bytes AND r.mtime_ns = rows.mtime_ns"""
"""What was found before there were checksums is known by its key and place, in a file that has not changed."""

_IN_SHARD = """INSERT OR IGNORE INTO dirty SELECT s.name FROM rows r JOIN shards s
    ON s.row_generation = r.generation AND s.split = r.split AND s.bucket_h = r.bucket_h AND s.bucket_w = r.bucket_w
    AND s.first_key <= IFNULL(r.stored_key, r.key) AND s.last_key >= IFNULL(r.stored_key, r.key)
    AND CASE s.payload WHEN 'repack' THEN 'npz' WHEN 'copy' THEN 'encode' ELSE s.payload END = r.payload
    WHERE r.key = ?"""
COLUMNS = """path, offset, length, file_bytes, mtime_ns, caption_stamp, caption, repeats, generation, split,
    bucket_h, bucket_w, payload, original_h, original_w, resized_h, resized_w, crop_top, crop_left, no_caption, mask,
    content"""
"""Those of a row, but for its key and `stored_key`."""


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
            mark_shards_of(connection, [update.key])
    return counts


def mark_shards_of(connection: sqlite3.Connection, keys: Iterable[str]) -> None:
    """The shards of these rows are to be compared with them at the next commit."""
    connection.executemany(_IN_SHARD, [(key,) for key in keys])


def set_aside(connection: sqlite3.Connection, keys: Sequence[str], reason: str) -> None:
    """These rows are in the next snapshot no more."""
    mark_shards_of(connection, keys)
    values = [(reason, key) for key in keys]
    # What is in no snapshot yet may not have been encoded; what only refers to a file comes back from that.
    is_stored = """generation IN (SELECT generation FROM generations WHERE committed)
        AND (content IS NOT NULL OR payload = 'encode')"""
    connection.executemany(
        f"""INSERT INTO removed SELECT key, {COLUMNS}, IFNULL(stored_key, key), ? FROM rows
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
    # By their keys in a table, because rows change while they are gone through, and there may be millions.
    connection.execute("DROP TABLE IF EXISTS temp.arrivals")
    connection.execute(
        f"""CREATE TEMP TABLE arrivals AS SELECT key FROM rows WHERE generation = ? AND (content IN
            (SELECT content FROM candidates UNION SELECT content FROM removed WHERE content IS NOT NULL)
            OR EXISTS (SELECT 1 FROM removed r WHERE {_SAME_PLACE})) ORDER BY key""",
        (generation,),
    )
    after = 0
    while page := connection.execute(_ARRIVALS, (after, after + _PAGE)).fetchall():
        after += _PAGE
        with transaction(connection):
            for key, content, caption in page:
                counts += _recognize_one(connection, key, content, caption if with_captions else None)
    return counts


def _recognize_one(connection: sqlite3.Connection, key: str, content: int | None, caption: str | None) -> Counter[str]:
    """Of one new row; its caption only where the stored one must have the same."""
    new = {"key": key, "content": content, "caption": caption}
    query = """SELECT old_rowid, vanished, '' FROM candidates
            WHERE content = :content AND IFNULL(:caption, caption) = caption
        UNION ALL SELECT rowid, 0, key FROM removed WHERE content = :content AND IFNULL(:caption, caption) = caption
        ORDER BY 2 DESC, 1 LIMIT 1"""
    found = connection.execute(query, new).fetchone()
    if found is None:
        query = f"""SELECT r.rowid, 0, r.key FROM rows JOIN removed r ON {_SAME_PLACE}
            WHERE rows.key = :key AND IFNULL(:caption, r.caption) = r.caption ORDER BY 1 LIMIT 1"""
        found = connection.execute(query, new).fetchone()
    counts: Counter[str] = Counter()
    if found is None:
        return counts
    replaced = "SELECT 1 FROM replaced WHERE key = ?"
    twin = _Twin(key, found[0], bool(found[1]))
    _take_place(connection, twin)
    of_now = twin.vanished or (found[2] != key and connection.execute(replaced, (found[2],)).fetchone())
    counts["renamed" if of_now else "back"] += 1
    counts["replaced"] += connection.execute(replaced, (key,)).fetchone() is not None
    return counts


def _take_place(connection: sqlite3.Connection, twin: _Twin) -> None:
    """The stored row gets the new one's key, caption, place and repeats; the new one, which is not stored yet, goes."""
    said = "path, offset, length, file_bytes, mtime_ns, caption_stamp, caption, no_caption, repeats, mask, content"
    values = connection.execute(f"SELECT {said} FROM rows WHERE key = ?", (twin.new_key,)).fetchone()
    assignments = ", ".join(f"{name} = ?" for name in said.split(", "))
    connection.execute("DELETE FROM rows WHERE key = ?", (twin.new_key,))
    if twin.vanished:
        (old_key,) = connection.execute("SELECT key FROM rows WHERE rowid = ?", (twin.old_rowid,)).fetchone()
        connection.execute("DELETE FROM vanished WHERE key = ?", (old_key,))
        connection.execute("DELETE FROM candidates WHERE old_rowid = ?", (twin.old_rowid,))
        connection.execute(
            "UPDATE rows SET stored_key = NULLIF(IFNULL(stored_key, key), :key), key = :key WHERE rowid = :row",
            {"key": twin.new_key, "row": twin.old_rowid},
        )
    else:
        connection.execute(
            f"INSERT INTO rows SELECT :key, {COLUMNS}, NULLIF(stored_key, :key) FROM removed WHERE rowid = :row",
            {"key": twin.new_key, "row": twin.old_rowid},
        )
        connection.execute("DELETE FROM removed WHERE rowid = ?", (twin.old_rowid,))
    connection.execute(f"UPDATE rows SET {assignments} WHERE key = ?", (*values, twin.new_key))
    connection.execute("UPDATE rows SET repeats = 1 WHERE key = ? AND split = 'validation'", (twin.new_key,))
    mark_shards_of(connection, [twin.new_key])


def vanished_of(connection: sqlite3.Connection, names: Iterable[str]) -> dict[str, tuple[int, int, str]]:
    """For each source of these names that has lost images: how many, of how many, and the first one's path.

    What is listed, but cannot be used any more or is left out by a filter, is not lost.
    """
    found = {}
    for name in names:
        ends = (f"{name}/", f"{name}0")  # "0" follows "/"
        query = """SELECT COUNT(*), MIN(r.path) FROM vanished v JOIN rows r ON r.key = v.key
            WHERE v.key > ? AND v.key < ? AND NOT EXISTS (SELECT 1 FROM bad b WHERE b.key = v.key)
            AND NOT EXISTS (SELECT 1 FROM filtered f WHERE f.content = r.content)"""
        lost, first = connection.execute(query, ends).fetchone()
        if lost:
            found[name] = lost, sum(_count(connection, table, ends) for table in ("rows", "filtered")), first
    return found


def _count(connection: sqlite3.Connection, table: str, ends: tuple[str, str]) -> int:
    return connection.execute(f"SELECT COUNT(*) FROM {table} WHERE key > ? AND key < ?", ends).fetchone()[0]


def set_vanished_aside(connection: sqlite3.Connection, page: int = _PAGE) -> int:
    """Set all aside that are not listed any more; returns how many, but for what cannot be used any more."""
    bad = "SELECT COUNT(*) FROM vanished v WHERE EXISTS (SELECT 1 FROM bad b WHERE b.key = v.key)"
    count = -connection.execute(bad).fetchone()[0]
    while keys := [key for (key,) in connection.execute("SELECT key FROM vanished LIMIT ?", (page,))]:
        with transaction(connection):
            set_aside(connection, keys, _REMOVED)
        connection.executemany("DELETE FROM vanished WHERE key = ?", [(key,) for key in keys])
        count += len(keys)
    return count

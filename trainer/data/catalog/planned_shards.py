"""How rows of the catalogue are grouped into shards: a shard is a range of keys of one generation, bucket and kind."""

import sqlite3
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

from trainer.data.buckets import Bucket, Placement
from trainer.data.catalog.catalog import (
    BadRow,
    CatalogRow,
    FileStamp,
    Payload,
    add_bad,
    open_generation,
    transaction,
)
from trainer.data.sources.source import MaskPlace

REFERENCES_PER_SHARD = 4
"""A shard that only says where the payload lies holds as many times more rows."""


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be written: the rows of one generation, split, bucket and kind whose keys, as they were when they were
    found, lie in first_key..last_key.

    `payload` is what the shard will hold. It is that of the rows, but for a `repack` of rows that are `npz` and a
    `copy` of rows that were encoded; then `row_generation`, under which the rows were found, is older than
    `generation`, under which they are written.
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
    with transaction(connection):
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
    for row_generation, split, height, width, *ends in connection.execute(query).fetchall():
        group = (split, height, width)
        found = _select_rows(connection, "IFNULL(stored_key, key)", (row_generation, *group, "npz"), ends)
        keys = (key for key, _ in found)
        while some := list(islice(keys, rows_per_shard)):
            name = names.next(group)
            shards.append((name, generation, row_generation, *group, "repack", some[0], some[-1], len(some)))
    with transaction(connection):
        _add_generation(connection, generation, shards)
        mark_dirty(connection, [shard[0] for shard in shards])  # some of its rows may have other keys by now
    return len(shards)


def plan_copies(connection: sqlite3.Connection, names: Sequence[str]) -> None:
    """Plan a generation of shards that hold what still counts of these; those of which nothing does are given up."""
    generation, numbers, copies = open_generation(connection), _ShardNames(open_generation(connection)), []
    with transaction(connection):
        for shard in shards_by_name(connection, names).values():
            if shard.payload not in ("encode", "copy"):
                continue
            group = (shard.split, shard.bucket.height_px, shard.bucket.width_px)
            ends, count = (shard.first_key, shard.last_key), len(rows_of_shard(connection, shard))
            copies.append((numbers.next(group), generation, shard.row_generation, *group, "copy", *ends, count))
            connection.execute(
                """DELETE FROM removed WHERE generation = ? AND split = ? AND bucket_h = ? AND bucket_w = ?
                    AND payload = 'encode' AND stored_key BETWEEN ? AND ?""",
                (shard.row_generation, *group, *ends),
            )
        _add_generation(connection, generation, copies)
        mark_dirty(connection, [copy[0] for copy in copies])


def source_of_copy(connection: sqlite3.Connection, shard: PlannedShard) -> str:
    """The name of the shard that a planned copy is to replace."""
    query = """SELECT s.name FROM shards s JOIN generations g ON g.generation = s.generation
        WHERE g.committed AND s.row_generation = ? AND s.split = ? AND s.bucket_h = ? AND s.bucket_w = ?
            AND s.payload IN ('encode', 'copy') AND s.first_key = ? AND s.last_key = ?"""
    bucket = shard.bucket
    group = (shard.row_generation, shard.split, bucket.height_px, bucket.width_px)
    (name,) = connection.execute(query, (*group, shard.first_key, shard.last_key)).fetchone()
    return name


def _select_rows(
    connection: sqlite3.Connection, columns: str, group: Sequence[Any], ends: Sequence[str]
) -> sqlite3.Cursor:
    """Columns of the rows of one group (generation, split, bucket, payload) whose keys in the shard lie between `ends`,
    by that key."""
    of_group = "generation = ? AND split = ? AND bucket_h = ? AND bucket_w = ? AND payload = ?"
    query = f"""SELECT {columns}, IFNULL(stored_key, key) AS found_as FROM rows
            WHERE {of_group} AND key BETWEEN ? AND ? AND stored_key IS NULL
        UNION ALL SELECT {columns}, stored_key FROM rows WHERE {of_group} AND stored_key BETWEEN ? AND ?
        ORDER BY found_as"""
    return connection.execute(query, (*group, *ends, *group, *ends))


def mark_dirty(connection: sqlite3.Connection, names: Collection[str]) -> None:
    """The shards are to be compared with their rows at the next commit."""
    connection.executemany("INSERT OR IGNORE INTO dirty VALUES (?)", [(name,) for name in names])


def dirty_shards(connection: sqlite3.Connection) -> set[str]:
    """Names of the shards of which something may have changed since the last commit."""
    return {name for (name,) in connection.execute("SELECT name FROM dirty")}


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
        connection.executemany("INSERT INTO shards VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", shards)
        connection.execute("INSERT INTO generations VALUES (?, 0)", (generation,))


def pending_generations(connection: sqlite3.Connection) -> list[int]:
    """Generations that are planned but in no snapshot yet."""
    query = "SELECT generation FROM generations WHERE NOT committed ORDER BY generation"
    return [generation for (generation,) in connection.execute(query)]


def pending_shards(connection: sqlite3.Connection) -> list[PlannedShard]:
    """The shards of the pending generations, finished or not, in the order of the snapshot."""
    return _shards(connection, "NOT g.committed")


def shards_by_name(connection: sqlite3.Connection, names: Collection[str]) -> dict[str, PlannedShard]:
    """Those of these names that there are, planned or committed."""
    found = (_shards(connection, "s.name = ?", (name,)) for name in sorted(names))
    return {shard.name: shard for shards in found for shard in shards}


def _shards(connection: sqlite3.Connection, which: str, values: Sequence[Any] = ()) -> list[PlannedShard]:
    query = f"""SELECT s.name, s.generation, s.row_generation, s.split, s.bucket_h, s.bucket_w, s.payload,
            s.first_key, s.last_key, s.rows
        FROM shards s JOIN generations g ON g.generation = s.generation WHERE {which}
        ORDER BY s.generation, s.name"""
    return [
        PlannedShard(name, generation, row_generation, split, Bucket(height, width), *others)
        for name, generation, row_generation, split, height, width, *others in connection.execute(query, tuple(values))
    ]


def rows_of_shard(connection: sqlite3.Connection, shard: PlannedShard) -> list[CatalogRow]:
    """The rows of one shard that there are now, in the order in which it holds them."""
    columns = """key, path, offset, length, payload, file_bytes, mtime_ns, caption_stamp, caption, repeats, split,
        original_h, original_w, resized_h, resized_w, crop_top, crop_left, mask, content, stored_key"""
    bucket = shard.bucket
    payload = {"repack": "npz", "copy": "encode"}.get(shard.payload, shard.payload)
    group = (shard.row_generation, shard.split, bucket.height_px, bucket.width_px, payload)
    placement = lru_cache(64)(lambda *sides: Placement(bucket, sides[:2], sides[2:]))
    return [
        CatalogRow._make(
            (
                *(*values[:5], FileStamp(*values[5:8]), *values[8:11], values[11:13], placement(*values[13:17])),
                None if values[17] is None else MaskPlace.from_text(values[17]),
                *values[18:20],
                None,
            )
        )
        for values in _select_rows(connection, columns, group, (shard.first_key, shard.last_key))
    ]


def replaced_shards(connection: sqlite3.Connection) -> set[str]:
    """Names of committed shards whose rows are held by the pending generations as well."""
    query = """SELECT DISTINCT old.name FROM shards new JOIN generations g ON g.generation = new.generation
        JOIN shards old ON old.row_generation = new.row_generation AND old.split = new.split
            AND old.bucket_h = new.bucket_h AND old.bucket_w = new.bucket_w AND old.generation != new.generation
            AND new.first_key BETWEEN old.first_key AND old.last_key
            AND old.payload IN (CASE new.payload WHEN 'repack' THEN 'npz' ELSE 'encode' END, new.payload)
        WHERE new.payload IN ('repack', 'copy') AND NOT g.committed"""
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
    connection.execute("DELETE FROM dirty")
    connection.executemany("UPDATE generations SET committed = 1 WHERE generation = ?", [(g,) for g in generations])


def forget_generation(connection: sqlite3.Connection, generation: int) -> None:
    """Its rows and shards were never planned; only for one of which no shard has been written."""
    with transaction(connection):
        connection.execute("DROP TABLE IF EXISTS looked_through")
        for table in ("rows", "shards", "generations"):
            connection.execute(f"DELETE FROM {table} WHERE generation = ?", (generation,))

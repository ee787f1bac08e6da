"""How rows of the catalogue are grouped into shards: a shard is a range of keys of one generation, bucket and kind.

Where images are trained at other resolutions as well, more shards hold the same range: they share its rows, their order
and whatever changes of them, and only their pixels are others.
"""

import sqlite3
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

from trainer.data.buckets import Bucket, Placement, place_into
from trainer.data.catalog.catalog import (
    BadRow,
    CatalogRow,
    FileStamp,
    Payload,
    add_bad,
    open_generation,
    transaction,
)
from trainer.data.catalog.changes import mark_shards_of
from trainer.data.sources.source import MaskPlace

ElsewhereOf = Callable[[Bucket], Sequence[tuple[int, Bucket]]]
"""The other resolutions that images of a bucket are to be held at, and in which buckets there."""

REFERENCES_PER_SHARD = 4
"""A shard that only says where the payload lies holds as many times more rows."""


@dataclass(frozen=True)
class PlannedShard:
    """A shard to be written: the rows of one generation, split, bucket and kind whose keys, as they were when they were
    found, lie in first_key..last_key.

    `payload` is what the shard will hold. It is that of the rows, but for a `repack` of rows that are `npz` and a
    `copy` of rows that were encoded; then `row_generation`, under which the rows were found, is older than
    `generation`, under which they are written.

    `bucket` is that of the file. It is `row_bucket`, that of the rows, but for images that are held at another
    `resolution` as well (0: the main one).
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
    row_bucket: Bucket
    resolution: int = 0

    @property
    def row_group(self) -> tuple[int, str, int, int]:
        """Generation, split and bucket of its rows."""
        return self.row_generation, self.split, self.row_bucket.height_px, self.row_bucket.width_px


def plan_generation(
    connection: sqlite3.Connection, rows_per_shard: int, elsewhere_of: ElsewhereOf | None = None
) -> int:
    """Group the open generation's rows into shards by split, bucket, kind and key, and close it; returns its shards.

    With them come the shards of other resolutions that are not planned yet, of older generations as well. The grouping
    is a function of the rows alone, so that a plan made after any interruption is the same.
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
            shards.append((names.next(group), generation, generation, *group, some[0], some[-1], len(some), *_MAIN))
    if elsewhere_of is not None:
        mains = [*map(_planned, shards), *_shards(connection, "s.resolution = 0")]
        # Of a shard and the copy that is to replace it, one.
        for main in {(main.row_group, main.first_key): main for main in mains}.values():
            shards += _elsewhere(connection, main, generation, names, elsewhere_of)
    with transaction(connection):
        _add_generation(connection, generation, shards)
        # Of rows that were found before some may have other keys by now.
        mark_dirty(connection, [name for name, _, row_generation, *_ in shards if row_generation != generation])
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
            shards.append((name, generation, row_generation, *group, "repack", some[0], some[-1], len(some), *_MAIN))
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
            name = numbers.next((shard.split, shard.bucket.height_px, shard.bucket.width_px))
            ends, count = (shard.first_key, shard.last_key), len(rows_of_shard(connection, shard))
            copies.append((name, generation, *shard.row_group, "copy", *ends, count, *_held(shard)))
            connection.execute(
                """DELETE FROM removed WHERE generation = ? AND split = ? AND bucket_h = ? AND bucket_w = ?
                    AND payload = 'encode' AND stored_key BETWEEN ? AND ?""",
                (*shard.row_group, *ends),
            )
        _add_generation(connection, generation, copies)
        mark_dirty(connection, [copy[0] for copy in copies])


def source_of_copy(connection: sqlite3.Connection, shard: PlannedShard) -> str:
    """The name of the shard that a planned copy is to replace."""
    query = """SELECT s.name FROM shards s JOIN generations g ON g.generation = s.generation
        WHERE g.committed AND s.row_generation = ? AND s.split = ? AND s.bucket_h = ? AND s.bucket_w = ?
            AND s.payload IN ('encode', 'copy') AND s.first_key = ? AND s.last_key = ? AND s.resolution = ?"""
    ends = (shard.first_key, shard.last_key)
    (name,) = connection.execute(query, (*shard.row_group, *ends, shard.resolution)).fetchone()
    return name


_MAIN = (0, None, None)


def _held(shard: PlannedShard) -> tuple[Any, ...]:
    """The last columns: at which other resolution it holds its rows, and in which bucket."""
    return (shard.resolution, shard.bucket.height_px, shard.bucket.width_px) if shard.resolution else _MAIN


def _elsewhere(
    connection: sqlite3.Connection,
    main: PlannedShard,
    generation: int,
    names: "_ShardNames",
    elsewhere_of: ElsewhereOf,
) -> Iterator[tuple[Any, ...]]:
    """The shards of other resolutions that a shard of the main one lacks."""
    if main.payload in ("npz", "repack"):
        return
    query = """SELECT resolution FROM shards WHERE row_generation = ? AND split = ? AND bucket_h = ? AND bucket_w = ?
        AND first_key = ? AND resolution != 0"""
    there = {resolution for (resolution,) in connection.execute(query, (*main.row_group, main.first_key))}
    lacking = [(resolution, bucket) for resolution, bucket in elsewhere_of(main.row_bucket) if resolution not in there]
    rows = len(rows_of_shard(connection, main)) if lacking else 0
    payload = "image" if main.payload == "image" else "encode"
    for resolution, bucket in lacking if rows else ():
        sides = bucket.height_px, bucket.width_px
        facts = (generation, *main.row_group, payload, main.first_key, main.last_key, rows)
        yield (names.next((main.split, *sides)), *facts, resolution, *sides)


def lacks_resolution(connection: sqlite3.Connection, elsewhere_of: ElsewhereOf) -> int | None:
    """One at which rows that are planned at the main resolution are not planned yet, if there is any."""
    names = _ShardNames(0)
    for main in _shards(connection, "s.resolution = 0"):
        for shard in _elsewhere(connection, main, 0, names, elsewhere_of):
            return _planned(shard).resolution
    return None


def main_shards(connection: sqlite3.Connection, replaced: Collection[str]) -> dict[str, str]:
    """For each shard of another resolution the name of that of the main one that holds the same rows.

    Args:
        replaced: names of shards in whose place others are to be.
    """
    query = """SELECT s.name, m.name FROM shards s JOIN shards m ON m.row_generation = s.row_generation
        AND m.split = s.split AND m.bucket_h = s.bucket_h AND m.bucket_w = s.bucket_w AND m.first_key = s.first_key
        AND m.resolution = 0 AND m.payload IN ('encode', 'copy', 'image') WHERE s.resolution != 0"""
    return {name: main for name, main in connection.execute(query) if main not in replaced}


def committed_shards(connection: sqlite3.Connection, resolution: int) -> list[PlannedShard]:
    """Those of one resolution that were in a snapshot once."""
    return _shards(connection, "g.committed AND s.resolution = ?", (resolution,))


def forget_unlisted(connection: sqlite3.Connection, listed: Collection[str]) -> None:
    """Of the committed shards of other resolutions, only these are there any more."""
    names = {shard.name for shard in _shards(connection, "g.committed AND s.resolution != 0")} - {*listed}
    connection.executemany("DELETE FROM shards WHERE name = ?", [(name,) for name in sorted(names)])


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
        connection.executemany(f"INSERT INTO shards VALUES ({', '.join('?' * 13)})", shards)
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
            s.first_key, s.last_key, s.rows, s.resolution, s.held_h, s.held_w
        FROM shards s JOIN generations g ON g.generation = s.generation WHERE {which}
        ORDER BY s.generation, s.name"""
    return [_planned(columns) for columns in connection.execute(query, tuple(values))]


def _planned(columns: Sequence[Any]) -> PlannedShard:
    """From a row of the table."""
    name, generation, row_generation, split, row_h, row_w, payload, first_key, last_key, rows, resolution, *held = (
        columns
    )
    row_bucket = Bucket(row_h, row_w)
    bucket = Bucket(held[0], held[1]) if resolution else row_bucket
    group = (name, generation, row_generation, split, bucket)
    return PlannedShard(*group, payload, first_key, last_key, rows, row_bucket, resolution)


def rows_of_shard(connection: sqlite3.Connection, shard: PlannedShard) -> list[CatalogRow]:
    """The rows of one shard that there are now, in the order in which it holds them."""
    columns = """key, path, offset, length, payload, file_bytes, mtime_ns, caption_stamp, caption, repeats, split,
        original_h, original_w, resized_h, resized_w, crop_top, crop_left, mask, content, stored_key"""
    payload = {"repack": "npz", "copy": "encode"}.get(shard.payload, shard.payload)
    group = (*shard.row_group, payload)
    placement = _placements(shard)
    return [
        CatalogRow._make(
            (
                *(*values[:5], FileStamp(*values[5:8]), *values[8:11], values[11:13], placement(*values[11:17])),
                None if values[17] is None else MaskPlace.from_text(values[17]),
                *values[18:20],
                None,
            )
        )
        for values in _select_rows(connection, columns, group, (shard.first_key, shard.last_key))
    ]


def _placements(shard: PlannedShard) -> Callable[..., Placement]:
    """Original and resized sides and the crop of a row, as the catalogue has them, to its placement in the shard."""

    def placement(*sides: int) -> Placement:
        if shard.resolution:
            return place_into((sides[0], sides[1]), shard.bucket)
        return Placement(shard.bucket, (sides[2], sides[3]), (sides[4], sides[5]))

    return lru_cache(64)(placement)


def replaced_shards(connection: sqlite3.Connection) -> set[str]:
    """Names of committed shards whose rows are held by the pending generations as well."""
    query = """SELECT DISTINCT old.name FROM shards new JOIN generations g ON g.generation = new.generation
        JOIN shards old ON old.row_generation = new.row_generation AND old.split = new.split
            AND old.bucket_h = new.bucket_h AND old.bucket_w = new.bucket_w AND old.generation != new.generation
            AND old.resolution = new.resolution
            AND new.first_key BETWEEN old.first_key AND old.last_key
            AND old.payload IN (CASE new.payload WHEN 'repack' THEN 'npz' ELSE 'encode' END, new.payload)
        WHERE new.payload IN ('repack', 'copy') AND NOT g.committed"""
    return {name for (name,) in connection.execute(query)}


def leave_excluded_out(connection: sqlite3.Connection, excluded: Sequence[BadRow]) -> None:
    """Images that could not be encoded move from the rows to the bad; other shards that hold them are to know it."""
    add_bad(connection, excluded)
    mark_shards_of(connection, [row.key for row in excluded])
    connection.executemany("DELETE FROM rows WHERE key = ? AND path = ?", [(row.key, row.path) for row in excluded])


def mark_committed(connection: sqlite3.Connection, generations: Sequence[int], replaced: Collection[str] = ()) -> None:
    """The generations are in a snapshot.

    Shards that were `replaced` are of the past: they are not planned to be replaced once more.
    """
    connection.executemany("DELETE FROM shards WHERE name = ?", [(name,) for name in sorted(replaced)])
    connection.execute("DELETE FROM dirty")
    connection.executemany("UPDATE generations SET committed = 1 WHERE generation = ?", [(g,) for g in generations])


def forget_generation(connection: sqlite3.Connection, generation: int) -> None:
    """Its rows and shards were never planned; only for one of which no shard has been written."""
    with transaction(connection):
        connection.execute("DROP TABLE IF EXISTS looked_through")
        for table in ("rows", "shards", "generations"):
            connection.execute(f"DELETE FROM {table} WHERE generation = ?", (generation,))

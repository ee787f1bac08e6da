"""Which of many 64-bit hashes differ in a few bits at most, found on disk and without comparing all with all.

The bits are cut into blocks. Of two hashes that differ in at most d bits, all blocks but d agree, so that it is enough
to compare those that agree in a choice of blocks, for each choice (Manku, Jain and Das Sarma, Detecting Near-Duplicates
for Web Crawling, 2007). How many blocks there are is chosen by the number of hashes.
"""

import sqlite3
from collections.abc import Iterator
from itertools import combinations, pairwise
from math import comb

import numpy as np
from numpy.typing import NDArray

from trainer.data.catalog.catalog import transaction

_BITS = 64
_MOST_BLOCKS = 14
_SECONDS_A_ROW, _SECONDS_A_PAIR = 3e-6, 4e-9  # to sort and read, and to compare; on one core
_ROWS_AT_ONCE = 1 << 16
_BLOCK = 2048


def find_near_pairs(connection: sqlite3.Connection, distance: int) -> None:
    """Fill `listing.pairs` (later, earlier) with the pairs of `listing.hashes` (hash, first) that differ in 1 to
    `distance` bits; each is told by its `first`, the smaller of which is the earlier."""
    connection.execute(
        "CREATE TABLE listing.pairs (later INTEGER, earlier INTEGER, PRIMARY KEY (later, earlier)) WITHOUT ROWID"
    )
    if not distance:
        return
    (count,) = connection.execute("SELECT COUNT(*) FROM listing.hashes").fetchone()
    for mask in choices_of_bits(distance, count):
        query = "SELECT hash & ? AS part, hash, first FROM listing.hashes ORDER BY part"
        for group in _groups(connection.execute(query, (mask,))):
            for pairs in _close(group[:, 1], group[:, 2], distance):
                with transaction(connection):
                    connection.executemany("INSERT OR IGNORE INTO listing.pairs VALUES (?, ?)", pairs.tolist())


def choices_of_bits(distance: int, count: int) -> list[int]:
    """Masks, as SQLite's signed numbers, so that any two hashes that differ in at most `distance` bits agree under one
    of them; as many as take the least time for `count` hashes."""

    def seconds(blocks: int) -> float:
        bits = (blocks - distance) * (_BITS // blocks)
        return comb(blocks, distance) * (count * _SECONDS_A_ROW + count**2 / 2 ** (bits + 1) * _SECONDS_A_PAIR)

    blocks = min(range(distance + 1, _MOST_BLOCKS + 1), key=seconds)
    ends = [_BITS * i // blocks for i in range(blocks + 1)]
    parts = [(1 << end) - (1 << begin) for begin, end in pairwise(ends)]
    masks = [sum(kept) for kept in combinations(parts, blocks - distance)]
    return [mask - (1 << _BITS) if mask >> (_BITS - 1) else mask for mask in masks]


def _groups(cursor: sqlite3.Cursor) -> Iterator[NDArray[np.int64]]:
    """Rows [n, 3], n > 1, whose first column is the same."""
    rest = np.empty((0, 3), dtype=np.int64)
    while rows := cursor.fetchmany(_ROWS_AT_ONCE):
        rest = np.concatenate([rest, np.array(rows, dtype=np.int64)])
        starts = np.flatnonzero(np.diff(rest[:, 0], prepend=~rest[0, 0]))
        for begin, end in pairwise(starts):
            if end - begin > 1:
                yield rest[begin:end]
        rest = rest[starts[-1] :]
    if len(rest) > 1:
        yield rest


def _close(hashes: NDArray[np.int64], names: NDArray[np.int64], distance: int) -> Iterator[NDArray[np.int64]]:
    """Pairs [n, 2] of names, the larger first, whose hashes differ in at most `distance` bits."""
    for top in range(0, len(hashes), _BLOCK):
        for left in range(top, len(hashes), _BLOCK):
            differing = hashes[top : top + _BLOCK, None] ^ hashes[None, left : left + _BLOCK]
            rows, columns = np.nonzero(np.bitwise_count(differing.view(np.uint64)) <= distance)
            rows, columns = rows + top, columns + left
            once = rows < columns
            pairs = np.stack([names[rows[once]], names[columns[once]]], axis=1)
            if len(pairs):
                yield np.sort(pairs, axis=1)[:, ::-1]

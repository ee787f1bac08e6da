"""Pairs of close hashes, against all with all."""

import sqlite3
from contextlib import closing

import numpy as np
import pytest

from trainer.data.catalog.near_pairs import choices_of_bits, find_near_pairs


@pytest.mark.parametrize("distance", [0, 1, 3, 6, 8])
def test_pairs_are_those_of_all_with_all(distance: int) -> None:
    rng = np.random.default_rng(distance)
    base = rng.integers(-(2**63), 2**63, 700, dtype=np.int64)
    flips = [np.bitwise_or.reduce(np.int64(1) << rng.integers(0, 64, rng.integers(1, 12))) for _ in base]
    crowd = rng.integers(0, 2**43, 2500, dtype=np.int64) << 20  # more than a block that agree in some bits
    hashes = np.unique(np.concatenate([base, base ^ np.array(flips, dtype=np.int64), crowd]))
    names = rng.permutation(len(hashes)) + 1
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("ATTACH ':memory:' AS listing")
        connection.execute("CREATE TABLE listing.hashes (hash INTEGER, first INTEGER)")
        values = zip(hashes.tolist(), names.tolist(), strict=True)
        connection.executemany("INSERT INTO listing.hashes VALUES (?, ?)", values)
        find_near_pairs(connection, distance)
        found = {*connection.execute("SELECT later, earlier FROM listing.pairs")}
    bits = np.bitwise_count((hashes[:, None] ^ hashes[None]).view(np.uint64))
    rows, columns = np.nonzero(np.triu(bits <= distance, 1))
    expected = {(max(a, b), min(a, b)) for a, b in zip(names[rows].tolist(), names[columns].tolist(), strict=True)}
    assert found == expected and (len(found) > 20 or distance == 0)


@pytest.mark.parametrize("count", [1000, 1_000_000, 12_400_000])
def test_few_pairs_have_to_be_compared(count: int) -> None:
    for distance in range(1, 9):
        masks = choices_of_bits(distance, count)
        bits = min(bin(mask % 2**64).count("1") for mask in masks)
        assert len(masks) * (count**2 / 2 ** (bits + 1) * 4e-9 + count * 3e-6) < 7200, (distance, len(masks), bits)

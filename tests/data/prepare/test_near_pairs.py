"""Pairs of close hashes, and which of them stay, against all with all."""

import resource

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.config.sections.data.filters_config import MOST_DISTANCE
from trainer.data.prepare.near_pairs import choose_blocks, first_of_near, near_pairs


def random_hashes(rng: np.random.Generator, count: int, most_flipped: int) -> NDArray[np.uint64]:
    """Different ones, in any order; half of them are others of which up to so many bits have been turned."""
    base = rng.integers(0, 2**64, count // 2, dtype=np.uint64)
    hashes = np.unique(np.concatenate([base, turned(rng, base, most_flipped)]))
    return rng.permutation(hashes)


def turned(rng: np.random.Generator, hashes: NDArray[np.uint64], most: int) -> NDArray[np.uint64]:
    bits = np.uint64(1) << rng.integers(0, 64, (len(hashes), most), dtype=np.uint64)
    bits[np.arange(most) >= rng.integers(1, most + 1, (len(hashes), 1))] = 0
    return hashes ^ np.bitwise_or.reduce(bits, axis=1)


def crowd_of(rng: np.random.Generator, count: int, most_flipped: int) -> NDArray[np.uint64]:
    """Different hashes that are all near to one."""
    some = turned(rng, np.full(4 * count, rng.integers(0, 2**64, dtype=np.uint64)), most_flipped)
    return rng.permutation(np.unique(some))[:count]


def pairs_of_all(hashes: NDArray[np.uint64], distance: int) -> NDArray[np.int64]:
    """Pairs [n, 2], by the first and then by the second, of all compared with all."""
    found = [np.empty((0, 2), dtype=np.int64)]
    for i in range(len(hashes) - 1):
        (later,) = np.nonzero(np.bitwise_count(hashes[i] ^ hashes[i + 1 :]) <= distance)
        found.append(np.stack([np.full(len(later), i), i + 1 + later], axis=1))
    return np.concatenate(found)


def gone_through(count: int, pairs: NDArray[np.int64]) -> list[int]:
    """The place of the one that stays for each, as the rule says it."""
    before: dict[int, list[int]] = {}
    for earlier, later in pairs.tolist():
        before.setdefault(later, []).append(earlier)
    stays: list[int] = []
    for i in range(count):
        stays.append(min((j for j in before.get(i, ()) if stays[j] == j), default=i))
    return stays


def by_place(pairs: NDArray[np.int32]) -> NDArray[np.int32]:
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


@pytest.mark.parametrize("distance", [*range(1, MOST_DISTANCE + 1)])
def test_pairs_are_those_of_all_with_all(distance: int) -> None:
    rng = np.random.default_rng(distance)
    small = random_hashes(rng, 1500, 12)
    lower = rng.integers(0, 2**20, 1000, dtype=np.uint64)  # all agree in most blocks
    hashes = rng.permutation(np.unique(np.concatenate([small, lower, crowd_of(rng, 500, 6)])))
    expected = pairs_of_all(hashes, distance)
    found = np.concatenate([*near_pairs(hashes, distance)])
    assert len(found) > 100 and np.array_equal(by_place(found), expected)
    across = np.concatenate([*near_pairs(hashes[:900], distance, hashes[900:])])
    across[:, 1] += 900
    assert np.array_equal(by_place(across), expected[(expected[:, 0] < 900) & (expected[:, 1] >= 900)])
    for most_pairs in (5, 300, 1 << 20):  # with few, halves are settled one after another
        assert first_of_near(hashes, distance, most_pairs).tolist() == gone_through(len(hashes), expected)


@pytest.mark.e2e
@pytest.mark.parametrize("distance", [4, MOST_DISTANCE])
def test_pairs_of_twenty_thousand(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = random_hashes(rng, 20_000, 12)
    expected = pairs_of_all(hashes, distance)
    found = np.concatenate([*near_pairs(hashes, distance)])
    assert len(found) > 1000 and np.array_equal(by_place(found), expected)
    assert first_of_near(hashes, distance).tolist() == gone_through(len(hashes), expected)


@pytest.mark.e2e
def test_a_crowd_does_not_cost_its_square() -> None:
    """40,000 nearly blank images, any two of which are near to one another: 800 million pairs, some
    minutes if they were gone through."""
    rng = np.random.default_rng(0)
    hashes = rng.permutation(np.concatenate([crowd_of(rng, 40_000, 4), random_hashes(rng, 20_000, 12)]))
    before, memory = cpu_seconds(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stays = first_of_near(hashes, 8)
    assert cpu_seconds() - before < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 150_000  # KB
    assert np.bincount(stays).max() == 40_000 and np.all(stays <= np.arange(len(stays)))


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize("count", [0, 1, 2])
def test_few_hashes(count: int) -> None:
    hashes = np.array([0, 2**64 - 1], dtype=np.uint64)[:count]
    assert first_of_near(hashes, 8).tolist() == [*range(count)]
    assert first_of_near(hashes, 0).tolist() == [*range(count)]


@pytest.mark.parametrize("count", [1000, 1_000_000, 12_400_000])
def test_any_hashes_that_are_near_agree_in_a_block(count: int) -> None:
    rng = np.random.default_rng(count)
    for distance in range(1, MOST_DISTANCE + 1):
        blocks = choose_blocks(count, distance)
        for _ in range(300):
            chosen = rng.permutation(64)[:distance].tolist()
            in_block = [sum(b.shift <= bit < b.shift + b.bits for bit in chosen) for b in blocks]
            assert any(n <= b.radius for n, b in zip(in_block, blocks, strict=True))
        assert all(len({*block.flips}) == block.masks for block in blocks)

"""The stored rows of one source and bucket, and how an epoch divides them among resolutions.

Where images are held at several resolutions (`data.buckets.also_at`), a pool's visits of an epoch, T of them, are cut
into intervals, one for each resolution in place of the main one, and the main one's. An epoch e begins to count at
floor(T frac(e g)) with g the golden ratio, so that over epochs each image is seen at each resolution in proportion to
the shares (the discrepancy of that sequence is O(log e / e)).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.data.buckets import OtherResolution
from trainer.data.permutation import SORT_BELOW, permuted, shuffled_range
from trainer.data.store.stretches import Stretch
from trainer.keyed import draw_seed

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Held:
    """Where the rows of a pool lie at one resolution.

    Attributes:
        resolution: 0: the main one.
        starts: [k] the first stored row of each stretch, in the bucket.
        share: of the pool's visits; None: each of them, beside the others.
    """

    resolution: int
    bucket: int
    starts: NDArray[np.int64]
    share: Fraction | None


@dataclass(frozen=True, eq=False)
class Pool:
    """Rows of one source and bucket.

    Attributes:
        bucket: of the main resolution.
        before: [k] how many rows come before each stretch, rising.
        held: the main resolution first.
    """

    source: str
    bucket: int
    rows: int
    before: NDArray[np.int64]
    held: tuple[Held, ...]

    def tell_apart(self, number: int, rounds: NDArray[np.int64]) -> NDArray[np.int64]:
        """A number for each time that a row is seen in an epoch, in its rounds and beside the main resolution."""
        beside = [each.share is None for each in self.held]
        return rounds * (1 + sum(beside)) + (sum(beside[: number + 1]) if beside[number] else 0)

    def stored(self, held: Held, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The stored rows at places within the pool."""
        stretch = np.searchsorted(self.before, places, side="right") - 1
        return held.starts[stretch] + places - self.before[stretch]

    def places(self, begin: int, visits: NDArray[np.int64], seed: int, shuffle: bool) -> NDArray[np.int64]:
        """Which rows the visits are of, counted from the pool's first epoch on at `begin`, round and round."""
        places = (begin + visits) % self.rows
        return _shuffled(places, self.rows, draw_seed(seed, "mixture", self.source, self.bucket)) if shuffle else places

    def visits(
        self, epoch: int, counts: Sequence[int], number: int, within: NDArray[np.int64], total: int
    ) -> NDArray[np.int64]:
        """Which of an epoch's `total` visits the rows of its `number`-th resolution are.

        Args:
            counts: how many each resolution takes.
            within: of the rows that this one takes, counted from 0.
        """
        if self.held[number].share is None or len(self.held) == 1:
            return within
        first = sum(n for n, held in zip(counts[:number], self.held[:number], strict=True) if held.share is not None)
        return (first + within - int(total * ((epoch * _GOLDEN) % 1))) % total


def make_pools(stretches: Sequence[Sequence[Stretch]], others: Sequence[OtherResolution]) -> tuple[Pool, ...]:
    """Of all buckets, by source and bucket; their names in order, so that the order of the configuration does not
    count. Rows that are held at other resolutions than the rest of their source and bucket are a pool of their own."""
    grouped: dict[tuple[str, int, tuple[int, ...]], list[Stretch]] = {}
    for bucket, of_bucket in enumerate(stretches):
        for stretch in of_bucket:
            key = (stretch.source, bucket, tuple(sorted(stretch.elsewhere)))
            if stretch.rows:
                grouped.setdefault(key, []).append(stretch)
    return tuple(_pool(source, bucket, grouped[source, bucket, at], others) for source, bucket, at in sorted(grouped))


def _pool(source: str, bucket: int, stretches: Sequence[Stretch], others: Sequence[OtherResolution]) -> Pool:
    ends = np.cumsum([0, *(stretch.rows for stretch in stretches)], dtype=np.int64)
    held = []
    for other in others:
        if other.resolution in stretches[0].elsewhere:
            there = [stretch.elsewhere[other.resolution] for stretch in stretches]
            share = None if other.share is None else exact(other.share)
            # Images of one bucket are in one bucket at any other resolution.
            held.append(Held(other.resolution, there[0][0], np.array([first for _, first in there]), share))
    left = 1 - sum(each.share for each in held if each.share is not None)
    main = Held(0, bucket, np.array([stretch.first for stretch in stretches], dtype=np.int64), Fraction(left))
    return Pool(source, bucket, int(ends[-1]), ends[:-1], (main, *held))


def exact(number: float) -> Fraction:
    """As it was written: 0.1 is a tenth."""
    return Fraction(repr(number))


def divide(pools: Sequence[Pool], totals: Sequence[int], epoch: int) -> list[list[int]]:
    """How many of each pool's visits are at each of its resolutions; over all pools as the shares say, to an image for
    each division.

    One resolution after the other is divided from what is left, by cumulative sums that begin at another fraction in
    each epoch, so that small pools have their turn.
    """
    counts = [
        [total if held.share is None else 0 for held in pool.held] for pool, total in zip(pools, totals, strict=True)
    ]
    left = list(totals)
    resolutions = sorted({held.resolution for pool in pools for held in pool.held[1:] if held.share is not None})
    shares_left = [Fraction(1)] * len(pools)
    for resolution in resolutions:
        so_far = Fraction(epoch * 413 % 997, 997)  # about the fractions of the multiples of the root of 2
        for i, pool in enumerate(pools):
            for number, held in enumerate(pool.held):
                if held.resolution == resolution and held.share is not None:
                    before, so_far = so_far, so_far + left[i] * held.share / shares_left[i]
                    counts[i][number] = math.floor(so_far) - math.floor(before)
                    left[i] -= counts[i][number]
                    shares_left[i] -= held.share
    for i in range(len(pools)):
        counts[i][0] = left[i]
    return counts


def _shuffled(places: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    return _table(size, key)[places].astype(np.int64) if size < SORT_BELOW else permuted(places, size, key)


@lru_cache(maxsize=16)
def _table(size: int, key: int) -> NDArray[np.uint16]:
    return shuffled_range(size, key)

"""How many images of each source an epoch takes, and which: closed formulas of (seed, epoch).

A source of N rows (images times repeats) gives T_e of them to epoch e:

    weight w      T_e = floor((e + 1) w N) - floor(e w N)
    per_epoch c   T_e = c
    share p       T_e = p U / (1 - P), P the sum of all shares, U what the sources without a share give; if all have
                  one, p times the sum of all N; rounded so that together they are what they should be

They are spread over its buckets b in proportion to their n_b rows, floor((T_e C_{b+1} + k) / N) -
floor((T_e C_b + k) / N) with C the cumulative n and k, a function of seed and epoch, in 0..N-1: that adds up to T_e,
and gives tiny buckets their turn. In a bucket, an epoch goes on in a keyed shuffle of the rows where the epoch before
ended, round and round: over epochs, no row is seen more than once more than another one of its source and bucket.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.permutation import SORT_BELOW, permuted, shuffled_range
from trainer.data.sampler import PADDING
from trainer.data.store.snapshot import PreparedSet
from trainer.keyed import draw_seed

RULES = ("weight", "per_epoch", "share")
_ROUND_BITS = 20  # repeats are below: a row of a round has the seeds of no other


@dataclass(frozen=True, eq=False)
class Mixture:
    """The rows of each epoch, which it counts from 0 in every bucket, and the stored rows that they stand for."""

    seed: int
    stored_rows: tuple[int, ...]
    """Virtual rows of each bucket, as they are stored."""
    sources: tuple["_Source", ...] = ()
    """Those of which an epoch takes more or less than all once, and the others; empty: all of everything once."""
    _begins: dict[int, NDArray[np.int64]] = field(default_factory=dict)
    """[sources, buckets] by epoch: rows that the epochs before it have taken. Threads that fill it at once write the
    same."""

    @staticmethod
    def of(prepared: PreparedSet, seed: int) -> "Mixture":
        """Of the images to train on, by the rules that the snapshot was made with."""
        rules = {
            source["name"]: {name: source[name] for name in RULES if source.get(name) is not None}
            for source in prepared.settings.get("data.sources", ())
            if "name" in source
        }
        stored = tuple(prepared.rows_per_bucket("train"))
        if not any(rules.values()):
            return Mixture(seed, stored)
        return Mixture(seed, stored, _sources(prepared, rules))

    def rows(self, epoch: int) -> Sequence[int]:
        """How many rows of each bucket an epoch takes."""
        if not self.sources:
            return self.stored_rows
        return self._taken(epoch).sum(axis=0).tolist()

    def rows_of_sources(self, epoch: int) -> dict[str, int]:
        """How many rows of each source an epoch takes; empty where all of everything is taken once."""
        if not self.sources:
            return {}
        return {s.name: int(n) for s, n in zip(self.sources, self._taken(epoch).sum(axis=1), strict=True)}

    def stored(self, epoch: int, bucket: int, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The stored rows of a bucket that rows of an epoch stand for, and what is to be added to their repeats.

        Args:
            ids: [m] in 0..rows(epoch)[bucket]; PADDING stays.
        """
        if not self.sources:
            return ids, np.zeros(len(ids), dtype=np.int64)
        found, rounds = np.full(len(ids), PADDING, dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
        begins, ends = self._begin(epoch), np.cumsum(self._taken(epoch)[:, bucket])
        of_source = np.where(ids == PADDING, -1, np.searchsorted(ends, ids, side="right"))
        for number, source in enumerate(self.sources):
            mine = np.flatnonzero(of_source == number)
            if not len(mine):
                continue
            within = ids[mine] - (ends[number - 1] if number else 0)
            begin, count = int(begins[number, bucket]), int(source.rows[bucket])
            rounds[mine] = (begin + within) // count - begin // count
            places = (begin + within) % count
            if source.rule:
                places = _shuffled(places, count, draw_seed(self.seed, "mixture", source.name, bucket))
            found[mine] = source.stored(bucket, places)
        return found, rounds << _ROUND_BITS

    def _taken(self, epoch: int) -> NDArray[np.int64]:
        """[sources, buckets]."""
        return self._begin(epoch + 1) - self._begin(epoch)

    def _begin(self, epoch: int) -> NDArray[np.int64]:
        """As in `_begins`."""
        known = next((e for e in range(epoch, 0, -1) if e in self._begins), 0)
        begins = self._begins.get(known, np.zeros((len(self.sources), len(self.stored_rows)), dtype=np.int64))
        for e in range(known, epoch):
            spread = [
                source.spread(total, draw_seed(self.seed, "spread", source.name, e))
                for source, total in zip(self.sources, _totals(self.sources, e), strict=True)
            ]
            begins = begins + np.array(spread, dtype=np.int64)
            self._begins[e + 1] = begins
        return begins


@dataclass(frozen=True, eq=False)
class _Source:
    """The rows of one source.

    Attributes:
        rule: at most one of `RULES`.
        rows: [buckets] virtual rows.
        segments: of each bucket: [k, 2], the first stored row of a stretch, and how many rows of this source come
            before it, rising.
    """

    name: str
    rule: Mapping[str, Any]
    rows: NDArray[np.int64]
    segments: tuple[NDArray[np.int64], ...]

    def stored(self, bucket: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """The stored rows at places within this source's rows of a bucket."""
        starts, before = self.segments[bucket].T
        segment = np.searchsorted(before, places, side="right") - 1
        return starts[segment] + places - before[segment]

    def spread(self, total: int, key: int) -> list[int]:
        """So many rows over the buckets."""
        all_rows, ends = int(self.rows.sum()), [0, *np.cumsum(self.rows).tolist()]
        if not all_rows:
            return [0] * len(self.rows)
        cuts = [(total * end + key % all_rows) // all_rows for end in ends]
        return [cuts[b + 1] - cuts[b] for b in range(len(self.rows))]


def _sources(prepared: PreparedSet, rules: Mapping[str, Mapping[str, Any]]) -> tuple[_Source, ...]:
    """By name, so that their order in the configuration does not count."""
    parts = prepared.parts_per_bucket("train")
    found = []
    for name in sorted({name for bucket in parts for name, _, _ in bucket}):
        segments, rows = [], []
        for bucket in parts:
            mine = [(start, count) for part, start, count in bucket if part == name and count]
            before = np.cumsum([0, *(count for _, count in mine)])
            segments.append(np.array([(start, b) for (start, _), b in zip(mine, before, strict=False)]).reshape(-1, 2))
            rows.append(int(before[-1]))
        found.append(_Source(name, rules.get(name, {}), np.array(rows, dtype=np.int64), tuple(segments)))
    return tuple(found)


def _totals(sources: Sequence[_Source], epoch: int) -> list[int]:
    """How many rows of each source an epoch takes."""
    all_rows = [int(source.rows.sum()) for source in sources]
    shares = [_exact(source.rule.get("share", 0)) for source in sources]
    totals = [_total(source.rule, rows, epoch) for source, rows in zip(sources, all_rows, strict=True)]
    sum_of_shares, others = sum(shares), sum(total for total, share in zip(totals, shares, strict=True) if not share)
    # Decimal shares of all sources may add up to a little less or more than 1.
    whole = Fraction(others) / (1 - sum_of_shares) if others else Fraction(sum(all_rows)) / (sum_of_shares or 1)
    given = Fraction(0)
    for i, share in enumerate(shares):
        if share and all_rows[i]:
            before, given = round(given), given + whole * share
            totals[i] = round(given) - before
    return totals


def _total(rule: Mapping[str, Any], rows: int, epoch: int) -> int:
    if "per_epoch" in rule:
        return rule["per_epoch"] if rows else 0
    if "share" in rule:
        return 0
    wish = _exact(rule.get("weight", 1)) * rows
    return int((epoch + 1) * wish) - int(epoch * wish)


def _exact(number: float) -> Fraction:
    """As it was written: 0.1 is a tenth."""
    return Fraction(repr(number))


def _shuffled(places: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    return _table(size, key)[places].astype(np.int64) if size < SORT_BELOW else permuted(places, size, key)


@lru_cache(maxsize=16)
def _table(size: int, key: int) -> NDArray[np.uint16]:
    return shuffled_range(size, key)

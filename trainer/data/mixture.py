"""How many images of each source an epoch takes, at which resolution, and which: closed formulas of (seed, epoch).

A source of N rows (images times repeats) gives T_e of them to epoch e:

    weight w      T_e = floor((e + 1) w N) - floor(e w N)
    per_epoch c   T_e = c
    share p       T_e = p U / (1 - P), P the sum of all shares, U what the sources without a share give; if all have
                  one, p times the sum of all N; rounded so that together they are what they should be

They are spread over its buckets b in proportion to their n_b rows, floor((T_e C_{b+1} + k) / N) -
floor((T_e C_b + k) / N) with C the cumulative n and k, a function of seed and epoch, in 0..N-1: that adds up to T_e,
and gives tiny buckets their turn. In a bucket, an epoch goes on in a keyed shuffle of the rows where the epoch before
ended, round and round: over epochs, no row is seen more than once more than another one of its source and bucket.
How these visits are divided among resolutions is told in `pools`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.buckets import other_resolutions
from trainer.data.pools import Pool, divide, exact, make_pools
from trainer.data.sampler import PADDING
from trainer.data.store.snapshot import PreparedSet
from trainer.data.store.stretches import stretches_per_bucket
from trainer.keyed import draw_seed

RULES = ("weight", "per_epoch", "share")
_IDS_AT_ONCE = 1 << 20
_ROUND_BITS = 20  # repeats are below: a row of a round has the seeds of no other


@dataclass(frozen=True)
class _Part:
    """The rows of an epoch and bucket that are of one pool and resolution: `end` is where they end."""

    pool: int
    number: int
    end: int


@dataclass(frozen=True)
class _Epoch:
    """What an epoch takes: of each pool the visits, by resolution how many; and of each bucket its parts."""

    begins: tuple[int, ...]
    totals: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    parts: tuple[tuple[_Part, ...], ...]


@dataclass(frozen=True, eq=False)
class Mixture:
    """The rows of each epoch, which it counts from 0 in every bucket, and the stored rows that they stand for."""

    seed: int
    stored_rows: tuple[int, ...]
    """Virtual rows of each bucket, as they are stored, at the main resolution."""
    pools: tuple[Pool, ...] = ()
    """Of sources of which an epoch takes more or less than all once, and of the others; empty: all of everything
    once."""
    rules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By source at most one of `RULES`."""
    _begins: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """By epoch: rows of each pool that the epochs before it have taken. Threads that fill it at once write the same."""
    _epochs: dict[int, _Epoch] = field(default_factory=dict)
    """Likewise."""

    @staticmethod
    def of(prepared: PreparedSet, seed: int) -> "Mixture":
        """Of the images to train on, by the rules that the snapshot was made with."""
        rules = {
            source["name"]: {name: source[name] for name in RULES if source.get(name) is not None}
            for source in prepared.settings.get("data.sources", ())
            if "name" in source
        }
        stored = tuple(prepared.rows_per_bucket("train"))
        if not any(rules.values()) and not prepared.has_other_resolutions:
            return Mixture(seed, stored)
        pools = make_pools(stretches_per_bucket(prepared), other_resolutions(prepared.settings))
        return Mixture(seed, stored, pools, rules)

    def rows(self, epoch: int) -> Sequence[int]:
        """How many rows of each bucket an epoch takes."""
        if not self.pools:
            return self.stored_rows
        return [parts[-1].end if parts else 0 for parts in self._epoch(epoch).parts]

    def rows_of_sources(self, epoch: int) -> dict[str, int]:
        """How many rows of each source an epoch takes, at whatever resolution; empty where all of everything is taken
        once."""
        found = dict.fromkeys((pool.source for pool in self.pools), 0)
        for pool, total in zip(self.pools, self._epoch(epoch).totals if self.pools else (), strict=True):
            found[pool.source] += total
        return found

    def rows_of_resolutions(self, epoch: int) -> dict[int, int]:
        """How many rows an epoch takes at each resolution, 0 being the main one; empty where there is no other."""
        found: dict[int, int] = {}
        if any(len(pool.held) > 1 for pool in self.pools):
            for pool, counts in zip(self.pools, self._epoch(epoch).counts, strict=True):
                for held, count in zip(pool.held, counts, strict=True):
                    found[held.resolution] = found.get(held.resolution, 0) + count
        return found

    def stored(self, epoch: int, bucket: int, ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The stored rows of a bucket that rows of an epoch stand for, and what is to be added to their repeats.

        Args:
            ids: [m] in 0..rows(epoch)[bucket]; PADDING stays.
        """
        if not self.pools:
            return ids, np.zeros(len(ids), dtype=np.int64)
        found, further = np.full(len(ids), PADDING, dtype=np.int64), np.zeros(len(ids), dtype=np.int64)
        for part, mine, places, rounds in self._parts_of(epoch, bucket, ids):
            pool = self.pools[part.pool]
            found[mine] = pool.stored(pool.held[part.number], places)
            further[mine] = rounds
        return found, further

    def visits(self, epoch: int, bucket: int, first: int, count: int) -> list[tuple[int, int]]:
        """Of stored rows of a bucket of the main resolution, `count` of them: the bucket of each visit in an epoch, and
        the row, from `first` on, with what is to be added to its repeat."""
        found = []
        for at, parts in enumerate(self._epoch(epoch).parts):
            begin = 0
            for wanted in parts:
                pool, ids = self.pools[wanted.pool], range(begin, wanted.end, _IDS_AT_ONCE)
                begin = wanted.end
                for i in ids if pool.bucket == bucket else ():
                    some = np.arange(i, min(i + _IDS_AT_ONCE, wanted.end), dtype=np.int64)
                    for part, _, places, further in self._parts_of(epoch, at, some):
                        rows = pool.stored(pool.held[0], places) - first
                        mine = (rows >= 0) & (rows < count)
                        found += [(pool.held[part.number].bucket, row) for row in (rows + further)[mine].tolist()]
        return sorted(found)

    def _parts_of(
        self, epoch: int, bucket: int, ids: NDArray[np.int64]
    ) -> Iterator[tuple[_Part, NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
        """For each part of a bucket which of the ids are of it, their places in its pool, and what is to be added to
        their repeats."""
        of, parts = self._epoch(epoch), self._epoch(epoch).parts[bucket]
        part_of = np.searchsorted([part.end for part in parts], ids, side="right")
        for number, part in enumerate(parts):
            mine = np.flatnonzero((part_of == number) & (ids != PADDING))
            if not len(mine):
                continue
            pool, begin = self.pools[part.pool], of.begins[part.pool]
            within = ids[mine] - (parts[number - 1].end if number else 0)
            visits = pool.visits(epoch, of.counts[part.pool], part.number, within, of.totals[part.pool])
            shuffle = len(pool.held) > 1 or bool(self.rules.get(pool.source))
            rounds = (begin + visits) // pool.rows - begin // pool.rows
            further = pool.tell_apart(part.number, rounds) << _ROUND_BITS
            yield part, mine, pool.places(begin, visits, self.seed, shuffle), further

    def _epoch(self, epoch: int) -> _Epoch:
        known = self._epochs.get(epoch)
        if known is not None:
            return known
        begins, ends = self._begin(epoch), self._begin(epoch + 1)
        totals = tuple(end - begin for begin, end in zip(begins, ends, strict=True))
        counts = divide(self.pools, totals, epoch)
        parts: list[list[_Part]] = [[] for _ in self.stored_rows]
        for number, (pool, of_pool) in enumerate(zip(self.pools, counts, strict=True)):
            for at, (held, count) in enumerate(zip(pool.held, of_pool, strict=True)):
                if count:
                    of_bucket = parts[held.bucket]
                    of_bucket.append(_Part(number, at, count + (of_bucket[-1].end if of_bucket else 0)))
        made = _Epoch(begins, totals, tuple(map(tuple, counts)), tuple(map(tuple, parts)))
        self._epochs[epoch] = made
        return made

    def _begin(self, epoch: int) -> tuple[int, ...]:
        """As in `_begins`."""
        known = next((e for e in range(epoch, 0, -1) if e in self._begins), 0)
        begins = self._begins.get(known, (0,) * len(self.pools))
        for e in range(known, epoch):
            begins = tuple(begin + taken for begin, taken in zip(begins, self._taken(e), strict=True))
            self._begins[e + 1] = begins
        return begins

    def _taken(self, epoch: int) -> list[int]:
        """Rows of each pool."""
        names = dict.fromkeys(pool.source for pool in self.pools)
        of_source = {name: [pool.rows for pool in self.pools if pool.source == name] for name in names}
        totals = _totals({name: sum(rows) for name, rows in of_source.items()}, self.rules, epoch)
        taken = []
        for name, total in zip(names, totals, strict=True):
            taken += _spread(total, of_source[name], draw_seed(self.seed, "spread", name, epoch))
        return taken


def _spread(total: int, rows: Sequence[int], key: int) -> list[int]:
    """So many rows over the pools of a source."""
    all_rows, ends = sum(rows), [0, *np.cumsum(rows).tolist()]
    if not all_rows:
        return [0] * len(rows)
    cuts = [(total * end + key % all_rows) // all_rows for end in ends]
    return [cuts[b + 1] - cuts[b] for b in range(len(rows))]


def _totals(rows_of: Mapping[str, int], rules: Mapping[str, Mapping[str, Any]], epoch: int) -> list[int]:
    """How many rows of each source an epoch takes."""
    all_rows, of_source = list(rows_of.values()), [rules.get(name, {}) for name in rows_of]
    shares = [exact(rule.get("share", 0)) for rule in of_source]
    totals = [_total(rule, rows, epoch) for rule, rows in zip(of_source, all_rows, strict=True)]
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
    wish = exact(rule.get("weight", 1)) * rows
    return int((epoch + 1) * wish) - int(epoch * wish)

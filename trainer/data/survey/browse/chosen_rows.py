"""Which images a page shows: as many of each bucket and source, spread evenly over their rows."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from trainer.data.store.snapshot import PreparedSet


class ChosenRow(NamedTuple):
    """A virtual row of a bucket of the training split; `source` is empty where the snapshot does not tell it."""

    bucket_index: int
    row: int
    source: str


def choose_rows(prepared: PreparedSet, count: int) -> list[ChosenRow]:
    """At most `count` rows; the same image may be among them more than once where it is repeated.

    Each bucket and source gets its turn, the largest first, until there are enough: so a source of a hundred images
    is seen beside one of ten million.
    """
    groups = sorted(_groups(prepared), key=lambda group: -group.rows)
    shares = _equal_shares([group.rows for group in groups], count)
    chosen = [row for group, share in zip(groups, shares, strict=True) for row in group.spread(share)]
    return sorted(chosen)


class _RowsOf(NamedTuple):
    """The rows of one source in one bucket, as stretches (first row, number of rows)."""

    bucket_index: int
    source: str
    stretches: Sequence[tuple[int, int]]

    @property
    def rows(self) -> int:
        return sum(count for _, count in self.stretches)

    def spread(self, count: int) -> Iterator[ChosenRow]:
        """So many of them, evenly, always the same."""
        if not count:
            return
        ends = np.cumsum([length for _, length in self.stretches])
        for place in np.linspace(0, self.rows - 1, count).astype(np.int64).tolist():
            part = int(np.searchsorted(ends, place, side="right"))
            first, length = self.stretches[part]
            yield ChosenRow(self.bucket_index, first + place - int(ends[part]) + length, self.source)


def _groups(prepared: PreparedSet) -> Iterator[_RowsOf]:
    parts_per_bucket, rows_per_bucket = prepared.parts_per_bucket("train"), prepared.rows_per_bucket("train")
    for bucket_index, (parts, rows) in enumerate(zip(parts_per_bucket, rows_per_bucket, strict=True)):
        if sum(count for _, _, count in parts) != rows:  # a snapshot from before there were parts
            yield _RowsOf(bucket_index, "", [(0, rows)])
            continue
        by_source: dict[str, list[tuple[int, int]]] = {}
        for source, first, count in parts:
            if count:
                by_source.setdefault(source, []).append((first, count))
        for source, stretches in by_source.items():
            yield _RowsOf(bucket_index, source, stretches)


def _equal_shares(sizes: Sequence[int], total: int) -> list[int]:
    """`total`, or all there is, dealt out one by one in turn; no more to any than its size."""
    shares, left = [0] * len(sizes), min(total, sum(sizes))
    while left:
        open_ones = [i for i, size in enumerate(sizes) if shares[i] < size]
        each, rest = divmod(left, len(open_ones))
        for turn, i in enumerate(open_ones):
            more = min(each + (turn < rest), sizes[i] - shares[i])
            shares[i] += more
            left -= more
    return shares

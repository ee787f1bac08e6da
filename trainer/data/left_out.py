"""Data that a run is to go past without training: stretches of an epoch's order, whatever the cut into steps.

Within an epoch, the rows of each bucket come in a fixed order (`sampler`), and those that some steps in a row take lie
between two of its cursors. So a stretch is two cursors per bucket, and which rows of a step lie in it is a comparison
of integers: the same on all workers, for any number of them, after any restart.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from trainer.data.sampler import PADDING, EpochPlan, Position, RowsOfEpoch, StepRows, next_epoch, planned_steps


@dataclass(frozen=True)
class Stretch:
    """A part of an epoch.

    Attributes:
        snapshot: of the data set; an epoch of another one has other rows in these places.
        seed: of the data order.
        begin, end: rows of each bucket that the epoch has taken before it, and with it.
    """

    epoch: int
    snapshot: str
    seed: int
    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """Virtual rows in it."""
        return sum(self.end) - sum(self.begin)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record."""
        return asdict(self) | {"begin": list(self.begin), "end": list(self.end)}

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "Stretch":
        """What `to_json` gave."""
        return Stretch(**{**record, "begin": tuple(record["begin"]), "end": tuple(record["end"])})


def stretches_of(left_out: Sequence[Stretch], snapshot: str, seed: int) -> tuple[Stretch, ...]:
    """Those that lie in the order of this data."""
    return tuple(part for part in left_out if (part.snapshot, part.seed) == (snapshot, seed))


def remaining_steps(
    rows_of: RowsOfEpoch, seed: int, position: Position, left_out: Sequence[Stretch]
) -> Iterator[tuple[StepRows, Position]]:
    """As `planned_steps`, without what is left out: a step of which no row stays is none.

    Args:
        left_out: of this data's order.
    """
    for rows, after in planned_steps(rows_of, seed, position):
        kept = without(rows, left_out)
        if kept is not None:
            yield kept, after


def without(rows: StepRows, left_out: Sequence[Stretch]) -> StepRows | None:
    """A step's rows with padding in place of those that are left out; None if none stays."""
    places = rows.begin + np.arange(len(rows.ids))
    stays = rows.weights > 0
    for part in left_out:
        if part.epoch == rows.epoch:
            stays &= (places < part.begin[rows.bucket]) | (places >= part.end[rows.bucket])
    if stays.sum() == rows.weights.sum():
        return rows
    if not stays.any():
        return None
    ids, weights = np.where(stays, rows.ids, PADDING), stays.astype(np.float32)
    return replace(rows, ids=ids, weights=weights)


def steps_left_out(
    rows_of: RowsOfEpoch, seed: int, position: Position, left_out: Sequence[Stretch], epochs: int
) -> int:
    """How many planned steps are none, from a position on to the end of so many epochs, its own the first."""
    count = 0
    for _ in range(epochs):
        parts = [part for part in left_out if part.epoch == position.epoch]
        if parts:
            plan = EpochPlan(rows_of(position.epoch), seed, position)
            count += sum(without(plan.step(t), parts) is None for t in range(position.step, plan.num_steps))
        elif not any(part.epoch > position.epoch for part in left_out):
            break
        position = next_epoch(position)
    return count


def stretch_before(
    rows_of: RowsOfEpoch, seed: int, end: Position, start: Position, most_steps: int, snapshot: str
) -> list[Stretch]:
    """The last `most_steps` planned steps before `end`, but none before `start`, as one stretch per epoch.

    Args:
        start: in the same data; of the same epoch as `end` it may be of an earlier segment.
    """
    stretches: list[Stretch] = []
    for epoch in range(end.epoch, start.epoch - 1, -1):
        of_end, of_start = epoch == end.epoch, epoch == start.epoch
        rows_per_bucket = rows_of(epoch)
        fresh = Position.start(len(rows_per_bucket), end.global_batch, epoch, end.batch_factors)
        plan = EpochPlan(rows_per_bucket, seed, end if of_end else start if of_start else fresh)
        last = end.step if of_end else plan.num_steps
        first = max(0, last - most_steps)
        if of_start and plan.position.segment == start.segment:
            first = max(first, start.step)
        begin = plan.cursors(first)
        if first == 0 and of_start and plan.position.segment != start.segment:  # on into the segments before
            begin = EpochPlan(rows_per_bucket, seed, start).cursors(start.step)
        if last > first:
            stretches.append(Stretch(epoch, snapshot, seed, begin, plan.cursors(last)))
        most_steps -= last - first
        if most_steps <= 0:
            break
    return stretches[::-1]

"""The order of training as a closed formula of (seed, position): which rows every optimizer step takes.

The unit is one optimizer step: `global_batch` rows of one bucket (or a multiple, in buckets of small images), over
all workers and micro-batches, so the content of a step never depends on how it is cut into ranks and micro-batches.

An epoch visits every row exactly once. Within a bucket the rows come in the order of a keyed shuffle, and the
rows taken so far are always a prefix of it; hence the whole state is one cursor per bucket. A stretch with a
constant `global_batch` is a segment; changing it opens a new segment that starts from those cursors.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trainer.data.permutation import SORT_BELOW, permuted, shuffled_range
from trainer.errors import UserError
from trainer.keyed import draw_seed

PADDING = -1
RowsOfEpoch = Callable[[int], Sequence[int]]
"""Virtual rows of each bucket that an epoch takes."""
_BLOCK = 4096
_CHUNK = 1 << 16


def same_each_epoch(rows_per_bucket: Sequence[int]) -> RowsOfEpoch:
    """All rows, in each epoch."""
    return lambda epoch: rows_per_bucket


@dataclass(frozen=True)
class Position:
    """Where training stands in the data: the next step to take. A few integers, whatever the data's size."""

    epoch: int
    segment: int
    """Stretch of the epoch with one global batch; 0 unless the global batch changed within the epoch."""
    step: int
    """Optimizer steps taken in this segment."""
    global_batch: int
    """Images per optimizer step, over all workers and micro-batches."""
    base_cursors: tuple[int, ...]
    """Rows of each bucket that were taken in this epoch before this segment."""
    batch_factors: tuple[int, ...]
    """Steps of each bucket hold so many times `global_batch` images."""

    @staticmethod
    def start(
        num_buckets: int, global_batch: int, epoch: int = 0, batch_factors: Sequence[int] | None = None
    ) -> "Position":
        """An epoch's first step; without `batch_factors` all steps hold `global_batch` images."""
        return Position(epoch, 0, 0, global_batch, (0,) * num_buckets, tuple(batch_factors or (1,) * num_buckets))

    @property
    def starts_epoch(self) -> bool:
        """Whether nothing of the epoch has been taken yet."""
        return self.step == 0 and not any(self.base_cursors)

    @property
    def images_per_step(self) -> NDArray[np.int64]:
        """Of each bucket."""
        return self.global_batch * np.asarray(self.batch_factors, dtype=np.int64)

    def to_json(self) -> dict[str, int | list[int]]:
        lists = {"base_cursors": list(self.base_cursors), "batch_factors": list(self.batch_factors)}
        return {**asdict(self), **lists}

    @staticmethod
    def from_json(record: dict) -> "Position":
        cursors = tuple(record["base_cursors"])
        factors = tuple(record.get("batch_factors", (1,) * len(cursors)))  # older checkpoints have none
        return Position(**{**record, "base_cursors": cursors, "batch_factors": factors})


@dataclass(frozen=True, eq=False)
class StepRows:
    """The rows of one optimizer step, all of one bucket."""

    epoch: int
    bucket: int
    """Index into the data set's list of buckets."""
    ids: NDArray[np.int64]
    """[G, or a multiple] virtual rows of the bucket; PADDING (-1) where the bucket had fewer left."""
    weights: NDArray[np.float32]
    """[G] 1, and 0 for padding."""
    begin: int = 0
    """Rows of the bucket that the epoch has taken before."""


class EpochPlan:
    """What is left of one epoch from the start of a segment; `step(t)` is a function of its arguments alone.

    The only thing kept between calls is a window of shuffled ids per bucket, because computing thousands of
    them at once costs little more than computing one.

    Memory: one byte (two above 256 buckets) per step, and 32 KB per bucket (128 KB for one just under 65,536 rows).
    """

    def __init__(self, rows_per_bucket: Sequence[int], seed: int, position: Position) -> None:
        """`rows_per_bucket` counts virtual rows, that is, rows times repeats.

        Raises:
            UserError: the position does not fit these buckets, or there are no rows at all.
        """
        rows = np.asarray(rows_per_bucket, dtype=np.int64)
        base = np.asarray(position.base_cursors, dtype=np.int64)
        if not rows.sum():
            raise UserError("the data set has no images to train on")
        if not base.shape == rows.shape == (len(position.batch_factors),) or (base < 0).any() or (base > rows).any():
            raise UserError("the saved position does not fit this data set: its buckets or their sizes differ")
        self.position = position
        self._rows, self._base, self._sizes = rows, base, position.images_per_step
        self._keys = [draw_seed(seed, "order", position.epoch, bucket) for bucket in range(len(rows))]
        self._windows: dict[int, tuple[int, NDArray[np.integer]]] = {}
        steps_of_bucket = -(-(rows - base) // self._sizes)
        order_key = draw_seed(seed, "steps", position.epoch, position.segment)
        self._bucket_of_step = _step_order(steps_of_bucket, order_key)
        self._taken_at_block = _counts_at_blocks(self._bucket_of_step, len(rows))
        if not 0 <= position.step <= self.num_steps:
            raise UserError(f"the saved position (step {position.step}) lies past the end of this data set's epoch")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the whole segment, those before `position.step` included."""
        return len(self._bucket_of_step)

    def step(self, t: int) -> StepRows:
        """Rows of the segment's t-th optimizer step."""
        bucket = int(self._bucket_of_step[t])
        block = t // _BLOCK
        earlier = np.count_nonzero(self._bucket_of_step[block * _BLOCK : t] == bucket)
        occurrence = int(self._taken_at_block[block, bucket]) + int(earlier)
        size = int(self._sizes[bucket])
        begin = int(self._base[bucket]) + occurrence * size
        taken = min(size, int(self._rows[bucket]) - begin)
        ids = np.full(size, PADDING, dtype=np.int64)
        ids[:taken] = self._shuffled(bucket, begin, taken)
        weights = np.zeros(size, dtype=np.float32)
        weights[:taken] = 1
        return StepRows(self.position.epoch, bucket, ids, weights, begin)

    def cursors(self, t: int) -> tuple[int, ...]:
        """Rows of each bucket that the epoch has taken before the segment's t-th step."""
        block = min(t // _BLOCK, len(self._taken_at_block) - 1)
        counts = self._taken_at_block[block].astype(np.int64)
        counts += np.bincount(self._bucket_of_step[block * _BLOCK : t], minlength=len(counts))
        return tuple(np.minimum(self._base + counts * self._sizes, self._rows).tolist())

    def after(self, t: int) -> Position:
        """The position once the segment's t-th step is taken; past the last one, the next epoch's start."""
        if t + 1 < self.num_steps:
            return replace(self.position, step=t + 1)
        return next_epoch(self.position)

    def _shuffled(self, bucket: int, begin: int, count: int) -> NDArray[np.integer]:
        start, window = self._windows.get(bucket, (0, np.empty(0, dtype=np.int64)))
        if not start <= begin <= begin + count <= start + len(window):
            size = int(self._rows[bucket])
            if size < SORT_BELOW:
                start, window = 0, shuffled_range(size, self._keys[bucket])
            else:
                end = min(begin + max(count, _BLOCK), size)
                start, window = begin, permuted(np.arange(begin, end), size, self._keys[bucket])
            self._windows[bucket] = (start, window)
        return window[begin - start : begin - start + count]


def planned_steps(rows_of: RowsOfEpoch, seed: int, position: Position) -> Iterator[tuple[StepRows, Position]]:
    """All steps from `position` on, epoch after epoch without end, each with the position after it."""
    while True:
        plan = EpochPlan(rows_of(position.epoch), seed, position)
        for t in range(position.step, plan.num_steps):
            yield plan.step(t), plan.after(t)
        position = next_epoch(position)


def next_epoch(position: Position) -> Position:
    """The start of the epoch after."""
    return Position.start(len(position.base_cursors), position.global_batch, position.epoch + 1, position.batch_factors)


def with_global_batch(
    position: Position,
    rows_per_bucket: Sequence[int],
    seed: int,
    global_batch: int,
    batch_factors: Sequence[int] | None = None,
) -> Position:
    """The same place in the data with another number of images per step; opens a new segment if it differs."""
    wanted = Position.start(len(rows_per_bucket), global_batch, position.epoch, batch_factors)
    if (global_batch, wanted.batch_factors) == (position.global_batch, position.batch_factors):
        return position
    cursors = EpochPlan(rows_per_bucket, seed, position).cursors(position.step)
    return replace(wanted, segment=position.segment + 1, base_cursors=cursors)


def steps_per_epoch(
    rows_per_bucket: Sequence[int], global_batch: int, batch_factors: Sequence[int] | None = None
) -> int:
    """Optimizer steps of an epoch with a constant global batch: each bucket's last step may be part-filled."""
    factors = batch_factors or [1] * len(rows_per_bucket)
    return sum(-(-rows // (global_batch * factor)) for rows, factor in zip(rows_per_bucket, factors, strict=True))


def epochs_done(position: Position, rows_per_bucket: Sequence[int]) -> float:
    """Passes over the data up to `position`; within an epoch in proportion to its steps."""
    before = sum(position.base_cursors) / sum(rows_per_bucket)
    left = [rows - taken for rows, taken in zip(rows_per_bucket, position.base_cursors, strict=True)]
    steps = steps_per_epoch(left, position.global_batch, position.batch_factors)
    return position.epoch + before + (1 - before) * position.step / steps


def share(
    rows: StepRows, rank: int, world: int, micro_batch: int, accumulation: int
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """A rank's part of a step, cut into micro-batches.

    Rank r of W takes rows r::W, so that padding spreads evenly, filled up to micro_batch * accumulation rows.

    Returns:
        `accumulation` pairs of ids [micro_batch] int64 (PADDING where empty) and weights [micro_batch] float32.
    """
    ids, weights = rows.ids[rank::world], rows.weights[rank::world]
    room = micro_batch * accumulation
    if len(ids) > room:
        raise ValueError(f"{len(ids)} rows do not fit in {accumulation} micro-batches of {micro_batch}")
    ids = np.concatenate([ids, np.full(room - len(ids), PADDING, dtype=np.int64)])
    weights = np.concatenate([weights, np.zeros(room - len(weights), dtype=np.float32)])
    return list(zip(ids.reshape(accumulation, -1), weights.reshape(accumulation, -1), strict=True))


def _step_order(steps_of_bucket: NDArray[np.int64], key: int) -> NDArray[np.unsignedinteger]:
    """The bucket of every step: each bucket as often as it has steps, shuffled. [total] uint8 or uint16."""
    dtype = np.uint8 if len(steps_of_bucket) <= 256 else np.uint16
    by_bucket = np.repeat(np.arange(len(steps_of_bucket), dtype=dtype), steps_of_bucket)
    total = len(by_bucket)
    if total < SORT_BELOW:
        return by_bucket[shuffled_range(total, key)]
    order = np.empty_like(by_bucket)
    for begin in range(0, total, _CHUNK):
        places = np.arange(begin, min(begin + _CHUNK, total))
        order[begin : begin + len(places)] = by_bucket[permuted(places, total, key)]
    return order


def _counts_at_blocks(bucket_of_step: NDArray[np.unsignedinteger], num_buckets: int) -> NDArray[np.uint32]:
    """How often each bucket occurs before every _BLOCK-th step. [blocks, num_buckets]."""
    num_blocks = max(1, -(-len(bucket_of_step) // _BLOCK))
    counts = np.zeros((num_blocks, num_buckets), dtype=np.uint32)
    for block in range(num_blocks - 1):
        part = bucket_of_step[block * _BLOCK : (block + 1) * _BLOCK]
        counts[block + 1] = counts[block] + np.bincount(part, minlength=num_buckets).astype(np.uint32)
    return counts


def pick_rows(rows_per_bucket: Sequence[int], count: int) -> list[tuple[int, int]]:
    """At most `count` (bucket, row) pairs, spread evenly over all rows; always the same ones."""
    ends = np.cumsum(rows_per_bucket, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    chosen = np.unique(np.linspace(0, max(total - 1, 0), min(count, total)).astype(np.int64))
    buckets = np.searchsorted(ends, chosen, side="right")
    return [(int(b), int(i - (ends[b] - rows_per_bucket[b]))) for b, i in zip(buckets, chosen, strict=True)]

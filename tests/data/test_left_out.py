"""What is left out of the data's order: the rows of some steps, all of them and no others, however steps are cut."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from trainer.data.left_out import Stretch, remaining_steps, steps_left_out, stretch_before, stretches_of
from trainer.data.sampler import Position, StepRows, planned_steps, same_each_epoch, steps_per_epoch, with_global_batch

ROWS, SEED, SNAPSHOT = [37, 8, 21], 5, "000001.json"


def epoch_steps(position: Position, epochs: int, left_out: tuple[Stretch, ...] = ()) -> list[tuple[StepRows, Position]]:
    taken = []
    for rows, after in remaining_steps(same_each_epoch(ROWS), SEED, position, left_out):
        if rows.epoch >= epochs:
            return taken
        taken.append((rows, after))
    raise AssertionError


def images(steps: list[tuple[StepRows, Position]]) -> Counter[tuple[int, int, int]]:
    return Counter((r.epoch, r.bucket, int(i)) for r, _ in steps for i, w in zip(r.ids, r.weights, strict=True) if w)


@pytest.mark.parametrize(("first", "last"), [(0, 3), (5, 6), (7, 12), (12, 20), (14, 18), (2, 33)])
def test_steps_are_left_out_whole_and_the_others_stay(first: int, last: int) -> None:
    """Also across the epoch's end, at step 18 (10 + 2 + 6 steps of 4)."""
    start = Position.start(len(ROWS), 4)
    steps = epoch_steps(start, 3)
    assert len(steps) == 3 * steps_per_epoch(ROWS, 4) == 54
    positions = [start, *(after for _, after in steps)]
    parts = stretch_before(same_each_epoch(ROWS), SEED, positions[last], positions[first], last - first, SNAPSHOT)
    kept = epoch_steps(start, 3, tuple(parts))
    assert [after for _, after in kept] == [after for _, after in steps[:first] + steps[last:]]
    assert all(np.array_equal(a.ids, b.ids) for (a, _), (b, _) in zip(kept, steps[:first] + steps[last:], strict=True))
    assert sum(part.num_rows for part in parts) == images(steps[first:last]).total()
    assert steps_left_out(same_each_epoch(ROWS), SEED, start, parts, 3) == last - first
    resumed = epoch_steps(positions[first], 3, tuple(parts))
    assert images(resumed) == images(steps[last:])
    assert [Stretch.from_json(part.to_json()) for part in parts] == parts


@pytest.mark.parametrize("other", [1, 3, 6, 8])
def test_other_steps_leave_out_the_same_images(other: int) -> None:
    """A global batch that was changed since: part-filled steps at the rims, none that has no row at all."""
    start = Position.start(len(ROWS), 4)
    steps = epoch_steps(start, 1)
    parts = tuple(stretch_before(same_each_epoch(ROWS), SEED, steps[9][1], steps[4][1], 99, SNAPSHOT))
    kept = epoch_steps(with_global_batch(start, ROWS, SEED, other), 1, parts)
    assert images(kept) == images(steps[:5] + steps[10:])
    assert all(rows.weights.any() and (rows.ids[rows.weights == 0] == -1).all() for rows, _ in kept)


def test_a_stretch_may_begin_before_the_global_batch_was_changed() -> None:
    start = Position.start(len(ROWS), 4)
    first = epoch_steps(start, 1)
    changed = with_global_batch(first[5][1], ROWS, SEED, 6)
    second = epoch_steps(changed, 1)
    (part,) = stretch_before(same_each_epoch(ROWS), SEED, second[2][1], first[3][1], 99, SNAPSHOT)
    assert images(first[:4]) + images(epoch_steps(first[3][1], 1, (part,))) == images(first[:4] + second[3:])


def test_no_more_than_is_allowed_is_left_out() -> None:
    steps = epoch_steps(Position.start(len(ROWS), 4), 2)
    parts = stretch_before(same_each_epoch(ROWS), SEED, steps[25][1], steps[3][1], 5, SNAPSHOT)
    assert images(epoch_steps(Position.start(len(ROWS), 4), 2, tuple(parts))) == images(steps[:21] + steps[26:])


def test_other_data_is_not_touched() -> None:
    part = Stretch(0, SNAPSHOT, SEED, (0, 0, 0), (9, 9, 9))
    assert stretches_of([part], SNAPSHOT, SEED) == (part,)
    assert stretches_of([part], "000002.json", SEED) == stretches_of([part], SNAPSHOT, 6) == ()
    later = replace(part, epoch=1)
    plain = list(zip(range(18), planned_steps(same_each_epoch(ROWS), SEED, Position.start(len(ROWS), 4)), strict=False))
    kept = epoch_steps(Position.start(len(ROWS), 4), 1, (later,))
    assert all(np.array_equal(a.ids, b.ids) for (_, (a, _)), (b, _) in zip(plain, kept, strict=True))

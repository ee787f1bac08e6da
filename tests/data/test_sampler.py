"""The order of training: exactly once, the same however it is cut, and resumable at any step."""

import hashlib
import json
import time
from collections import Counter

import numpy as np
import pytest

from trainer.data.sampler import (
    EpochPlan,
    Position,
    StepRows,
    pick_rows,
    planned_steps,
    same_each_epoch,
    share,
    steps_per_epoch,
    with_global_batch,
)
from trainer.errors import UserError

SEED = 11


def _random_rows(rng: np.random.Generator, global_batch: int) -> list[int]:
    edges = [0, 1, global_batch - 1, global_batch, global_batch + 1]
    return [*edges, *rng.integers(0, 300, rng.integers(1, 8)).tolist()]


def _taken(steps: list[StepRows]) -> Counter[tuple[int, int]]:
    return Counter((rows.bucket, int(i)) for rows in steps for i in rows.ids[rows.weights > 0])


def _everything(rows_per_bucket: list[int]) -> Counter[tuple[int, int]]:
    return Counter((bucket, i) for bucket, rows in enumerate(rows_per_bucket) for i in range(rows))


def _rest_of_epoch(rows_per_bucket: list[int], position: Position, limit: int | None = None) -> tuple[list, Position]:
    """Up to `limit` steps of the position's epoch, and the position after them."""
    steps, epoch = [], position.epoch
    for rows, after in planned_steps(same_each_epoch(rows_per_bucket), SEED, position):
        if rows.epoch != epoch or len(steps) == limit:
            break
        steps.append(rows)
        position = after
    return steps, position


@pytest.mark.parametrize("case", range(12))
def test_an_epoch_takes_every_row_once(case: int) -> None:
    rng = np.random.default_rng(case)
    global_batch = int(rng.integers(1, 20))
    rows = _random_rows(rng, global_batch)
    steps, position = _rest_of_epoch(rows, Position.start(len(rows), global_batch))
    assert _taken(steps) == _everything(rows)
    assert len(steps) == steps_per_epoch(rows, global_batch)
    assert position == Position.start(len(rows), global_batch, epoch=1)
    for step in steps:
        assert step.ids.shape == step.weights.shape == (global_batch,)
        assert np.array_equal(step.ids >= 0, step.weights == 1)


@pytest.mark.parametrize("case", range(12))
def test_changes_of_the_global_batch_lose_and_repeat_nothing(case: int) -> None:
    rng = np.random.default_rng(100 + case)
    rows = _random_rows(rng, 8)
    position = Position.start(len(rows), 8)
    taken: Counter[tuple[int, int]] = Counter()
    for world in (4, 3, 8, 3, 1):
        position = with_global_batch(position, rows, SEED, world * 2)
        steps, position = _rest_of_epoch(rows, position, limit=int(rng.integers(0, 12)))
        taken += _taken(steps)
        position = Position.from_json(json.loads(json.dumps(position.to_json())))
        if position.epoch:
            break
    if not position.epoch:
        taken += _taken(_rest_of_epoch(rows, position)[0])
    assert taken == _everything(rows)


@pytest.mark.parametrize("case", range(6))
def test_buckets_with_larger_batches(case: int) -> None:
    """Factors that change in mid-epoch, with and without the global batch: every row once, sizes as asked for."""
    rng = np.random.default_rng(200 + case)
    rows = _random_rows(rng, 8)
    factors, others, third = (rng.integers(1, 5, len(rows)).tolist() for _ in range(3))
    assert steps_per_epoch(rows, 4, factors) == sum(-(-n // (4 * f)) for n, f in zip(rows, factors, strict=True))
    position = Position.start(len(rows), 4, batch_factors=factors)
    taken: Counter[tuple[int, int]] = Counter()
    for global_batch, new in ((4, factors), (4, others), (6, third), (6, None)):
        segment = position.segment
        position = with_global_batch(position, rows, SEED, global_batch, new)
        assert (position.segment == segment) == (new is factors)
        steps, position = _rest_of_epoch(rows, position, limit=int(rng.integers(1, 8)))
        for step in steps:
            assert len(step.ids) == global_batch * (new[step.bucket] if new else 1)
        taken += _taken(steps)
        position = Position.from_json(json.loads(json.dumps(position.to_json())))
        if position.epoch:
            break
    if not position.epoch:
        steps, position = _rest_of_epoch(rows, position)
        taken += _taken(steps)
    assert taken == _everything(rows)
    assert position.starts_epoch and position.epoch == 1


def test_positions_of_older_checkpoints_are_read() -> None:
    record = Position.start(3, 8).to_json()
    del record["batch_factors"]
    assert Position.from_json(record) == Position.start(3, 8)


def test_a_large_set_over_changing_worlds() -> None:
    """Buckets on both sides of 65,536 rows, so that both shuffles are met."""
    rows = [70_001, 65_535, 131_072, 3]
    seen = [np.zeros(n, dtype=np.int64) for n in rows]
    position = Position.start(len(rows), 4 * 32)
    for world, limit in ((4, 700), (3, 700), (8, 10_000)):
        position = with_global_batch(position, rows, SEED, world * 32)
        steps, position = _rest_of_epoch(rows, position, limit)
        for step in steps:
            seen[step.bucket][step.ids[step.ids >= 0]] += 1
    assert position.epoch == 1
    assert all((counts == 1).all() for counts in seen)


def test_resume_at_any_step_goes_on_with_the_same_steps() -> None:
    rows = [40, 0, 9, 77]
    whole = planned_steps(same_each_epoch(rows), SEED, Position.start(4, 5))
    steps = [next(whole) for _ in range(60)]  # into the third epoch
    assert steps[-1][0].epoch == 2
    for index in range(0, 59, 7):
        expected, after = steps[index + 1]
        resumed, resumed_after = next(planned_steps(same_each_epoch(rows), SEED, steps[index][1]))
        assert (resumed.epoch, resumed.bucket) == (expected.epoch, expected.bucket)
        assert np.array_equal(resumed.ids, expected.ids)
        assert resumed_after == after


def test_steps_are_a_function_of_their_index() -> None:
    plan = EpochPlan([70_000, 500], SEED, Position.start(2, 8))
    forwards = [plan.step(t).ids for t in range(0, plan.num_steps, 311)]
    backwards = [plan.step(t).ids for t in reversed(range(0, plan.num_steps, 311))]
    assert all(np.array_equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    rows = [100, 100]
    orders = [
        tuple(int(i) for t in range(20) for i in plan.step(t).ids)
        for plan in (
            EpochPlan(rows, 1, Position.start(2, 10)),
            EpochPlan(rows, 2, Position.start(2, 10)),
            EpochPlan(rows, 1, Position.start(2, 10, epoch=1)),
        )
    ]
    assert len(set(orders)) == 3


@pytest.mark.parametrize(
    ("world", "micro_batch", "accumulation"), [(1, 12, 1), (4, 3, 1), (2, 2, 3), (3, 1, 4), (5, 1, 3)]
)
def test_a_step_holds_the_same_rows_however_it_is_cut(world: int, micro_batch: int, accumulation: int) -> None:
    rows = [30, 7, 25]
    for step in _rest_of_epoch(rows, Position.start(3, 12))[0]:
        parts = [p for rank in range(world) for p in share(step, rank, world, micro_batch, accumulation)]
        assert len(parts) == world * accumulation
        assert all(ids.shape == weights.shape == (micro_batch,) for ids, weights in parts)
        ids = np.concatenate([ids for ids, _ in parts])
        weights = np.concatenate([weights for _, weights in parts])
        assert np.array_equal(np.sort(ids[ids >= 0]), np.sort(step.ids[step.ids >= 0]))
        assert weights.sum() == step.weights.sum()
        assert (weights[ids < 0] == 0).all()


def test_a_share_that_does_not_fit_is_refused() -> None:
    step = EpochPlan([100], SEED, Position.start(1, 10)).step(0)
    with pytest.raises(ValueError, match="5 rows do not fit in 2 micro-batches of 2"):
        share(step, 0, 2, 2, 2)


def test_buckets_are_mixed_as_if_drawn_independently() -> None:
    rows = np.random.default_rng(5).integers(600, 20_000, 40).tolist()
    plan = EpochPlan(rows, SEED, Position.start(len(rows), 4))
    buckets = np.array([plan.step(t).bucket for t in range(plan.num_steps)])
    same_as_previous = (buckets[1:] == buckets[:-1]).mean()
    expected = ((np.bincount(buckets) / len(buckets)) ** 2).sum()
    assert abs(same_as_previous / expected - 1) < 0.05


def test_a_position_of_other_data_is_refused() -> None:
    with pytest.raises(UserError, match="does not fit this data set"):
        EpochPlan([10, 10], SEED, Position.start(3, 2))
    with pytest.raises(UserError, match="does not fit this data set"):
        EpochPlan([10], SEED, Position(0, 1, 0, 2, (11,), (1,)))
    with pytest.raises(UserError, match="past the end"):
        EpochPlan([10], SEED, Position(0, 0, 6, 2, (0,), (1,)))
    with pytest.raises(UserError, match="no images"):
        EpochPlan([0, 0], SEED, Position.start(2, 2))


def test_twelve_million_rows_cost_next_to_nothing() -> None:
    """Bounds are five to ten times what was measured, in CPU time, so that a busy machine does not fail them."""
    rows = (np.random.default_rng(0).dirichlet(np.full(40, 0.8)) * 12_446_670).astype(int).tolist()
    before = time.process_time()
    plan = EpochPlan(rows, SEED, Position(3, 0, 200_000, 32, (0,) * 40, (1,) * 40))
    plan.step(200_000)
    opened = time.process_time()
    for t in range(200_000, 202_000):
        plan.step(t)
    done = time.process_time()
    assert opened - before < 0.2
    assert (done - opened) / 2000 < 200e-6


def test_the_order_has_not_changed() -> None:
    """A changed order would break the resume of every run that was started before."""
    plan = EpochPlan([50, 70_000, 6], SEED, Position.start(3, 6))
    first = [(rows.bucket, rows.ids.tolist()) for rows in map(plan.step, (0, 1, 5000))]
    assert first == GOLDEN_STEPS
    digest = hashlib.sha256()
    for t in range(0, plan.num_steps, 10):
        digest.update(plan.step(t).ids.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == GOLDEN_DIGEST


GOLDEN_STEPS = [
    (1, [50001, 56714, 43761, 66886, 8048, 633]),
    (1, [12444, 65591, 69757, 34042, 31832, 56650]),
    (1, [54701, 7171, 29020, 30169, 7889, 60791]),
]
GOLDEN_DIGEST = "c510c77dae08830b"


def test_rows_are_picked_evenly_from_all_buckets() -> None:
    assert pick_rows([3, 0, 2], 99) == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert pick_rows([10, 10], 3) == [(0, 0), (0, 9), (1, 9)]
    assert pick_rows([], 5) == pick_rows([4], 0) == []

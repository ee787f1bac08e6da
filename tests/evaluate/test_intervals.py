"""Intervals of means over images, beside SciPy's own tests and beside what they promise."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from trainer.evaluate.validating.intervals import Estimate, difference, mean_of


@pytest.mark.parametrize("count", [2, 3, 10, 256])
def test_a_mean_has_students_interval(count: int) -> None:
    values = np.random.default_rng(count).gamma(2.0, 0.1, count)
    found = mean_of(values.tolist(), [1.0] * count)
    low, high = stats.t.interval(0.95, count - 1, loc=values.mean(), scale=stats.sem(values))
    assert found.mean == pytest.approx(values.mean(), rel=1e-14) and found.images == count
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-12)


def test_copies_count_as_weights_and_not_as_images() -> None:
    values, copies = [0.3, 0.9, 0.5, 0.7], [1.0, 3.0, 1.0, 2.0]
    found, once = mean_of(values, copies), mean_of(values, [2.5] * 4)
    assert found.mean == pytest.approx(np.average(values, weights=copies), rel=1e-14) and found.images == 4
    weights = np.array(copies) / 7
    assert found.standard_error == pytest.approx(math.sqrt(4 / 3 * (weights**2 @ (np.array(values) - found.mean) ** 2)))
    assert once.half_width == pytest.approx(mean_of(values, [1.0] * 4).half_width, rel=1e-13)


def test_the_order_does_not_matter() -> None:
    rng = random.Random(1)
    pairs = [(10.0 ** rng.uniform(-8, 8), float(rng.randint(1, 4))) for _ in range(500)]
    first = mean_of(*zip(*pairs, strict=True))
    for _ in range(5):
        rng.shuffle(pairs)
        again = mean_of(*zip(*pairs, strict=True))
        assert again == first


def test_a_difference_has_welchs_interval() -> None:
    rng = np.random.default_rng(3)
    one, other = rng.normal(1.0, 0.5, 12), rng.normal(0.8, 0.1, 30)
    found = difference(*(mean_of(each.tolist(), [1.0] * len(each)) for each in (one, other)))
    theirs = stats.ttest_ind(one, other, equal_var=False).confidence_interval(0.95)
    assert found.half_width is not None
    assert found.mean - found.half_width == pytest.approx(theirs.low, rel=1e-10)
    assert found.mean + found.half_width == pytest.approx(theirs.high, rel=1e-10)


def test_what_is_not_known_is_not_told() -> None:
    assert math.isnan(mean_of([], []).mean) and mean_of([], []).half_width is None
    alone = mean_of([0.25], [3.0])
    assert alone == Estimate(0.25, 1, None, 0.0) and alone.half_width is None
    assert difference(mean_of([1.0, 2.0], [1.0, 1.0]), alone).half_width is None
    same = mean_of([0.5, 0.5], [1.0, 1.0])
    assert difference(same, same).half_width == 0.0
    assert math.isnan(mean_of([math.nan, 1.0], [1.0, 1.0]).mean)
    assert math.isinf(mean_of([math.inf, 1.0], [1.0, 1.0]).mean)


@pytest.mark.parametrize("count", [3, 8])
def test_nineteen_of_twenty_intervals_hold_the_mean(count: int) -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for sample in rng.normal(2.0, 0.7, (4000, count)):
        found = mean_of(sample.tolist(), [1.0] * count)
        assert found.half_width is not None
        hits += abs(found.mean - 2.0) <= found.half_width
    assert hits / 4000 == pytest.approx(0.95, abs=0.012)  # three and a half standard errors

"""Which steps are skipped: spikes are, healthy series are not; a guard that was saved decides as before."""

import json
import math
from functools import partial

import numpy as np
import pytest

from trainer.train.guard.numerics_guard import IN_A_ROW, GuardRules, NumericsGuard, TakenStep, Verdict

RULES = GuardRules()


def after(
    guard: NumericsGuard, step: int, loss: float, norm: float, images: float = 16
) -> tuple[NumericsGuard, Verdict]:
    verdict = guard.judge(RULES, loss, norm, images)
    return guard.after(RULES, verdict, TakenStep(loss, norm, images), step), verdict


def known(steps: int = 128, seed: int = 0) -> NumericsGuard:
    """One that has seen so many healthy steps."""
    random, guard = np.random.default_rng(seed), NumericsGuard()
    for step in range(steps):
        guard, verdict = after(guard, step, *np.exp(random.normal([-2.0, 0.0], 0.3)).tolist())
        assert not verdict.reason
    return guard


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (0.1, math.nan), (math.inf, 1.0), (0.1, math.inf)])
@pytest.mark.parametrize("steps", [0, 128])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(loss: float, norm: float, steps: int) -> None:
    verdict = known(steps).judge(RULES, loss, norm, 16)
    assert verdict.reason.endswith("not finite") and verdict.is_fault


@pytest.mark.parametrize(("loss", "norm", "which"), [(1e3, 1.0, "loss"), (0.13, 1e3, "gradient norm")])
def test_a_spike_is_skipped_once_enough_is_known(loss: float, norm: float, which: str) -> None:
    assert known(64).judge(RULES, loss, norm, 16).reason.startswith(f"{which} {loss if loss > 1 else norm:.4g}, above ")
    assert not known(63).judge(RULES, loss, norm, 16).reason
    assert not known().judge(GuardRules(sigma=0), loss, norm, 16).reason


def test_the_limit_is_six_standard_deviations_of_the_logarithms() -> None:
    guard = known()
    verdict, logs = guard.judge(RULES, 0.1, 1.0, 16), np.log([[step.loss, step.norm] for step in guard.taken])
    expected = np.exp(logs.mean(0) + 6 * logs.std(0, ddof=1))
    assert [verdict.loss_limit, verdict.norm_limit] == pytest.approx(expected)
    assert not guard.judge(RULES, verdict.loss_limit * 0.999, verdict.norm_limit * 0.999, 16).reason
    assert guard.judge(RULES, verdict.loss_limit * 1.001, 1.0, 16).is_fault
    assert not guard.judge(RULES, 1e-9, 1e-9, 16).reason  # what is small does no harm


def test_a_skipped_step_is_not_usual_and_rows_of_them_are_counted() -> None:
    before = guard = known()
    for row in range(1, IN_A_ROW + 1):
        guard, verdict = after(guard, 200 + row, 1e3, 1.0)
        assert verdict.is_fault and (guard.in_a_row, guard.sound_step) == (row, 201) and guard.taken == before.taken
    guard, _ = after(guard, 210, 0.1, 1.0)
    assert guard.in_a_row == 0 and guard.taken == (*before.taken[1:], TakenStep(0.1, 1.0, 16))


def test_an_overflow_of_fp16_is_no_fault_but_a_spike_is() -> None:
    rules, guard = GuardRules(in_fp16=True), known()
    verdict = guard.judge(rules, 0.1, math.inf, 16)
    assert verdict.reason and not verdict.is_fault
    assert guard.after(rules, verdict, TakenStep(0.1, math.inf, 16), 9) == guard
    assert guard.judge(rules, 0.1, 1e4, 16).is_fault


def test_a_step_without_images_is_neither_taken_nor_a_fault() -> None:
    guard = known()
    after_it, verdict = after(guard, 5, math.nan, 0.0, images=0)
    assert not verdict.reason and after_it == guard


def test_few_images_may_stray_farther() -> None:
    """As much as a mean over fewer of them does."""
    guard = known()
    limits = [guard.judge(RULES, 0.1, 1.0, images) for images in (16, 4, 1)]
    heights = [math.log(verdict.loss_limit) for verdict in limits]
    assert heights == sorted(heights) and heights[2] > heights[0] + math.log(4)


def test_losses_that_are_not_above_zero_are_no_spikes() -> None:
    """Those of contrastive objectives may be negative."""
    guard = NumericsGuard()
    for step in range(300):
        guard, verdict = after(guard, step, math.sin(step) - 0.5, 1.0)
        assert not verdict.reason


def test_a_guard_that_was_saved_decides_alike() -> None:
    guard, _ = after(known(100), 100, 50.0, 1.0)
    again = NumericsGuard.from_json(json.loads(json.dumps(guard.to_json())))
    assert again == guard and again.in_a_row == 1
    assert again.judge(RULES, 0.3, 2.0, 16) == guard.judge(RULES, 0.3, 2.0, 16)


def log_normal(random: np.random.Generator, sigma: float, mean: float = 0.0) -> float:
    return math.exp(random.normal(mean, sigma))


def gamma_mean(random: np.random.Generator, images: int) -> float:
    """The mean of so many losses, of which one is often ten times the other."""
    return float(random.gamma(0.8, 1.25, images).mean())


@pytest.mark.parametrize(
    "draw",
    [
        partial(log_normal, sigma=0.1),
        partial(log_normal, sigma=0.5),  # from one timestep to another
        partial(log_normal, sigma=1.0),
        partial(gamma_mean, images=4),
        partial(gamma_mean, images=16),
    ],
)
def test_healthy_series_are_left_alone(draw: partial[float]) -> None:
    """2,000 steps whose loss falls to a third, with norms of heavy tails that fall from a hundred times the last."""
    random, guard, skipped = np.random.default_rng(1), NumericsGuard(), 0
    for step in range(2000):
        loss = draw(random) * (1 / 3 + 2 / 3 * math.exp(-step / 500))
        norm = log_normal(random, 0.4) * (1 + 100 * math.exp(-step / 50))
        guard, verdict = after(guard, step, loss, norm)
        skipped += bool(verdict.reason)
    assert skipped == 0


def test_a_new_epoch_with_other_images_is_left_alone() -> None:
    random, guard = np.random.default_rng(2), NumericsGuard()
    for step in range(600):
        loss = log_normal(random, 0.3, mean=-2.0 if step < 300 else -1.2)  # more than twice as much from one step on
        guard, verdict = after(guard, step, loss, log_normal(random, 0.3))
        assert not verdict.reason

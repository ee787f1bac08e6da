"""Profiles of running averages against diffusers, against quadrature of the paper's integrals, and a second way."""

import math

import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from trainer.optim.ema_profile import (
    MAX_SIGMA_REL,
    Matrix,
    PlainEma,
    PowerEma,
    Profile,
    ProfileAt,
    gamma_of,
    inner_products,
    reconstruction_weights,
    sigma_rel_of,
)

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(80)


def integral(gamma: float, end: float, low: float, high: float, power: float = 0.0) -> float:
    """Of p(s) * (s / end)^power from low to high, by Gauss-Legendre quadrature."""
    s = low + (high - low) * (_NODES + 1) / 2
    p = (gamma + 1) * (s / end) ** gamma / end
    return float(np.sum(_NODE_WEIGHTS * p * (s / end) ** power) * (high - low) / 2)


def step_weights(profile: Profile, steps: int, every: int = 1) -> Matrix:
    """What each step's weights count after `steps`, from the recursion."""
    weights = np.zeros(steps)
    for step in range(every, steps + 1, every):
        decay = profile.decay_over(step - every, step)
        weights *= decay
        weights[step - 1] += 1 - decay
    return weights


def test_warm_up_is_that_of_diffusers() -> None:
    theirs = EMAModel([nn.Parameter(torch.zeros(1))], decay=0.99)
    ours = PlainEma(0.99)
    for step in range(1, 2000):
        assert ours.decay_at(step) == theirs.get_decay(step)
    assert PlainEma(0.99, warms_up=False).decay_at(1) == 0.99


@pytest.mark.parametrize("profile", [PlainEma(0.9), PlainEma(0.9, warms_up=False), PowerEma(0.1)])
@pytest.mark.parametrize("done", [0, 1, 7, 100])
def test_decay_over_several_steps_is_the_product(profile: Profile, done: int) -> None:
    product = math.prod(profile.decay_at(step) for step in range(done + 1, done + 6))
    assert profile.decay_over(done, done + 5) == pytest.approx(product, rel=1e-12)


def test_exponents_of_lengths() -> None:
    """The paper's two (section 3.2), the equation's inverse, and the standard deviation of p by quadrature."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)
    for sigma_rel in (0.005, 0.02, 0.05, 0.1, 0.2, 0.28):
        gamma = gamma_of(sigma_rel)
        assert sigma_rel_of(gamma) == pytest.approx(sigma_rel, rel=1e-9)
        pieces = [(low, low + 1) for low in range(50)]
        mean, square = (sum(integral(gamma, 50, *piece, power) for piece in pieces) for power in (1, 2))
        assert math.sqrt(square - mean**2) == pytest.approx(sigma_rel, rel=1e-6)
    assert sigma_rel_of(0) == pytest.approx(MAX_SIGMA_REL)
    for wrong in (0.0, -0.1, MAX_SIGMA_REL, 1.0):
        with pytest.raises(ValueError, match="must be above 0 and below 0"):
            PowerEma(wrong)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.25])
def test_power_function_is_its_integral(sigma_rel: float) -> None:
    """Section 3.1, equations 2 to 4: what the recursion gives each step is the integral of p over that step."""
    steps, gamma = 60, gamma_of(sigma_rel)
    found = step_weights(PowerEma(sigma_rel), steps)
    expected = [integral(gamma, steps, step - 1, step) for step in range(1, steps + 1)]
    assert found == pytest.approx(expected, abs=1e-10)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert PowerEma(sigma_rel).decay_at(1) == 0  # what was there before the first step counts nothing


@pytest.mark.parametrize("every", [2, 5])
@pytest.mark.parametrize("profile", [PlainEma(0.9), PlainEma(0.9, warms_up=False), PowerEma(0.1)])
def test_rarer_updates_count_for_the_steps_before(profile: Profile, every: int) -> None:
    often, rarely = step_weights(profile, 60), step_weights(profile, 60, every)
    assert rarely[every - 1 :: every] == pytest.approx(often.reshape(-1, every).sum(axis=1), abs=1e-14)


def test_inner_products_are_integrals() -> None:
    profiles = [ProfileAt(10, 0.05), ProfileAt(10, 0.2), ProfileAt(25, 0.1), ProfileAt(40, 0.02)]
    found = inner_products(profiles, profiles)
    for row, a in enumerate(profiles):
        for column, b in enumerate(profiles):
            total = 0.0
            for low in range(min(a.step, b.step)):
                s = low + (_NODES + 1) / 2
                p, q = ((g + 1) * (s / e) ** g / e for e, g in ((x.step, gamma_of(x.sigma_rel)) for x in (a, b)))
                total += float(np.sum(_NODE_WEIGHTS * p * q) / 2)
            assert found[row, column] == pytest.approx(total, rel=1e-9)


def stored_profiles(steps: int, number: int) -> list[ProfileAt]:
    return [ProfileAt(steps * n // number, s) for n in range(1, number + 1) for s in (0.05, 0.10)]


@pytest.mark.parametrize("sigma_rel", [0.03, 0.07, 0.15, 0.25])
def test_reconstruction_is_the_least_squares_fit_of_step_weights(sigma_rel: float) -> None:
    """A second way: fit the step weights of the recursion themselves, by numpy, without any formula of appendix C."""
    steps = 4000
    stored = stored_profiles(steps, 8)
    columns = [np.pad(step_weights(PowerEma(each.sigma_rel), each.step), (0, steps - each.step)) for each in stored]
    wanted = step_weights(PowerEma(sigma_rel), steps)
    matrix = np.stack(columns, axis=1)
    expected = np.linalg.lstsq(matrix, wanted, rcond=None)[0]
    found = reconstruction_weights(stored, ProfileAt(steps, sigma_rel))
    assert found.weights == pytest.approx(expected / expected.sum(), abs=0.02 * np.abs(expected).max())
    error = np.linalg.norm(matrix @ found.weights - wanted) / np.linalg.norm(wanted)
    assert found.relative_error == pytest.approx(error, rel=0.02)
    assert found.weights.sum() == pytest.approx(1, abs=1e-12)


def test_more_stored_averages_reconstruct_better_and_stored_ones_exactly() -> None:
    """Between both stored lengths a few suffice; shorter and longer ones take more (the paper's figure of errors)."""
    for sigma_rel, number, most in [(0.07, 8, 0.02), (0.15, 8, 0.05), (0.03, 40, 0.01), (0.2, 40, 0.01)]:
        errors = [
            reconstruction_weights(stored_profiles(100_000, n), ProfileAt(100_000, sigma_rel)).relative_error
            for n in (number, 2 * number)
        ]
        assert errors[0] < most
        assert errors[1] < errors[0] / 2
    stored = stored_profiles(1000, 4)
    same = reconstruction_weights(stored, stored[5])
    assert same.weights == pytest.approx(np.eye(8)[5], abs=1e-9)
    assert same.relative_error < 1e-6 and same.amplification == pytest.approx(1)


def test_what_is_stored_twice_is_no_obstacle() -> None:
    stored = stored_profiles(1000, 4)
    wanted = ProfileAt(1000, 0.07)
    once, twice = reconstruction_weights(stored, wanted), reconstruction_weights([*stored, *stored], wanted)
    assert twice.weights[:8] + twice.weights[8:] == pytest.approx(once.weights, abs=1e-9)


def test_nothing_stored_and_no_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="no stored average"):
        reconstruction_weights([], ProfileAt(10, 0.1))
    with pytest.raises(ValueError, match="begins with step 1"):
        reconstruction_weights([ProfileAt(0, 0.1)], ProfileAt(10, 0.1))
    with pytest.raises(ValueError, match=r"decay = 1\.0"):
        PlainEma(1.0)

"""What is learnt from losses, against losses whose means are known, torch's own gradients and torch's own Adam."""

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.diffusion.test_timesteps import CLOSE, UNIFORMS, distance
from trainer.diffusion.importance import BINS, LossHistory
from trainer.diffusion.learner import Learner, Seen, seen_by
from trainer.diffusion.objective import Objective, taught
from trainer.diffusion.prediction import Prediction, epsilon, flow, v_prediction
from trainer.diffusion.uncertainty import LearnedWeights
from trainer.diffusion.weighting import min_snr


def seen_of(positions: Tensor, losses: Tensor, weights: Tensor | None = None) -> Seen:
    log_snr = epsilon().log_snr(positions)
    return Seen(positions, log_snr, losses.double(), torch.ones_like(positions) if weights is None else weights)


def teach(learner: Learner, steps: int, mean_loss: Callable[[Tensor], Tensor], images: int = 64, seed: int = 0) -> None:
    """By images at positions of the learner's own, with losses of a gamma distribution of shape 4."""
    drawn = np.random.default_rng(seed)
    for _ in range(steps):
        uniforms = torch.from_numpy(drawn.random(images))
        positions = learner.positions(uniforms) if isinstance(learner, LossHistory) else uniforms
        losses = mean_loss(positions) * torch.from_numpy(drawn.gamma(4.0, 0.25, images))
        learner.learn(learner.sums(seen_of(positions, losses)))


def slope(positions: Tensor) -> Tensor:
    return 0.2 + 3 * positions**2


def test_positions_are_even_until_each_part_has_seen_enough() -> None:
    history = LossHistory()
    teach(history, 10, slope)
    assert torch.equal(history.density(), torch.ones(BINS, dtype=torch.float64))
    teach(history, 200, slope)
    assert not torch.equal(history.density(), torch.ones(BINS, dtype=torch.float64))


def test_a_million_draws_by_importance() -> None:
    """The density is the root of the mean square, which of these losses is the mean times sqrt(1.25)."""
    history = LossHistory(even_share=0.1)
    teach(history, 2000, slope)
    positions = history.positions(UNIFORMS)
    drawn = np.random.default_rng(3)
    proposals = drawn.random(4_000_000)
    density = 0.1 + 0.9 * slope(torch.from_numpy(proposals)).numpy() / 1.2
    expected = proposals[drawn.random(len(proposals)) < density / density.max()]
    assert distance(positions, expected) < 2 * CLOSE + 0.01  # a history of 100 losses is 3 % off, either way
    assert (history.positions(UNIFORMS.sort().values).diff() >= 0).all()


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (0.2, 0.7)])
def test_the_expected_loss_is_that_of_even_positions(low: float, high: float) -> None:
    history = LossHistory(low=low, high=high)
    teach(history, 1000, slope)
    positions = history.positions(UNIFORMS)
    assert positions.min() >= low and positions.max() < high
    factors = history.factors(flow().mix(positions))
    even, corrected = slope(low + (high - low) * UNIFORMS), slope(positions) * factors
    assert float(corrected.mean()) == pytest.approx(float(even.mean()), rel=3e-3)
    # That is what it is for: the same mean from losses that differ less.
    assert corrected.std() < 0.2 * even.std()


def test_learned_weights_follow_the_loss() -> None:
    """exp(u) is the mean loss at each noise level, from a thousandth to ten."""
    weights = LearnedWeights()

    def mean_loss(positions: Tensor) -> Tensor:
        return (-3 + 5 * torch.sin(4 * positions)).exp()

    teach(weights, 3000, mean_loss)
    positions = torch.linspace(0.02, 0.98, 200, dtype=torch.float64)
    found = weights.log_loss(epsilon().log_snr(positions))
    assert (found - mean_loss(positions).log()).abs().max() < 0.25
    assert (found - mean_loss(positions).log()).abs().mean() < 0.08


def test_learned_weights_take_torchs_steps() -> None:
    """Gradients of mean(exp(-u) L + u) by autograd, and torch's Adam."""
    weights = LearnedWeights(lr=0.02)
    record = weights.record()
    frequencies, phases = (torch.tensor(record[name], dtype=torch.float64) for name in ("frequencies", "phases"))
    layer = torch.zeros(128, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([layer], lr=0.02, betas=(0.9, 0.99))
    drawn = torch.Generator().manual_seed(0)
    for _ in range(20):
        positions, losses = (torch.rand(16, generator=drawn, dtype=torch.float64) for _ in range(2))
        mixture = v_prediction().mix(positions)
        sigma = mixture.noise / mixture.signal
        features = math.sqrt(2) * torch.cos(2 * math.pi * (sigma.log()[:, None] / 4 * frequencies + phases))
        u = features @ layer / math.sqrt(128)
        adam.zero_grad()
        (torch.exp(-u) * losses + u).mean().backward()
        assert weights.factors(mixture) == pytest.approx(torch.exp(-u).tolist(), rel=1e-9)
        adam.step()
        seen = Seen(positions, mixture.log_snr, losses, torch.ones(16, dtype=torch.float64))
        weights.learn(weights.sums(seen))
    assert weights.record()["layer"] == pytest.approx(layer.tolist(), rel=1e-9)


LEARNERS = {"importance": LossHistory, "learned": LearnedWeights}


@pytest.mark.parametrize("name", LEARNERS)
def test_what_is_taken_up_again_goes_on_to_the_bit(name: str) -> None:
    whole, first, second = (LEARNERS[name]() for _ in range(3))
    teach(whole, 60, slope)
    teach(first, 60, slope)
    second.take_up(json.loads(json.dumps(first.record())))
    for learner in (whole, second):
        teach(learner, 40, slope, seed=1)
    assert second.record() == whole.record()
    with pytest.raises((ValueError, KeyError)):
        second.take_up({"squares": [1.0]})


@pytest.mark.parametrize("name", LEARNERS)
def test_sums_of_the_parts_are_those_of_the_whole(name: str) -> None:
    """Padding and unreadable rows left out."""
    learner = LEARNERS[name]()
    teach(learner, 100, slope)
    positions, losses = torch.rand(2, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([1.0, 1, 1, 0] * 3, dtype=torch.float64)
    there = counts > 0
    whole = learner.sums(seen_of(positions[there], losses[there]))
    parts = [learner.sums(seen_of(positions[i::4], losses[i::4], counts[i::4])) for i in range(4)]
    assert torch.tensor(parts).sum(dim=0).tolist() == pytest.approx(whole, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", LEARNERS)
def test_an_objective_weights_and_the_learner_sees_the_loss_without(name: str) -> None:
    learner = LEARNERS[name]()
    teach(learner, 100, slope)
    objective = taught(Objective(epsilon(), weigh=min_snr(5.0)), learner)
    mixture = epsilon().mix(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
    prediction, target = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = (prediction - target).square().mean(dim=(1, 2, 3)) * min_snr(5.0)(mixture)
    losses = objective.losses(prediction, target, mixture)
    assert losses.tolist() == pytest.approx((plain * learner.factors(mixture)).tolist(), rel=1e-6)
    seen = seen_by([mixture], [torch.ones(3)], losses.tolist(), learner)
    assert seen.losses.tolist() == pytest.approx(plain.tolist(), rel=1e-6)


@pytest.mark.parametrize("prediction", [epsilon(), v_prediction(with_zero_terminal_snr=True), flow()])
def test_both_ends_of_the_process_are_finite(prediction: Prediction) -> None:
    ends = prediction.mix(torch.tensor([0.0, 0.0005, 0.9995, 1 - 1e-12], dtype=torch.float64))
    for learner in (LossHistory(), LearnedWeights()):
        teach(learner, 300, slope)
        assert learner.factors(ends).isfinite().all() and (learner.factors(ends) > 0).all()

"""A million draws of each distribution against its formula."""

import numpy as np
import pytest
import torch

from trainer.diffusion.prediction import epsilon, flow, v_prediction
from trainer.diffusion.timesteps import (
    EVENLY,
    Distribution,
    aligned_with_flow,
    beta,
    by_weights,
    laplace,
    logit_normal,
    stratified,
    uniform,
)

COUNT = 1_000_000
UNIFORMS = torch.rand(COUNT, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CLOSE = 2.0 / COUNT**0.5  # Kolmogorov's distance of a million draws is below this but once in 1,500 times


def distance(found: torch.Tensor, expected: np.ndarray) -> float:
    """Largest difference between the two samples' cumulative distributions."""
    ordered, other = np.sort(found.numpy()), np.sort(expected)
    grid = np.concatenate([ordered[::97], other[::97]])
    return float(
        np.abs(np.searchsorted(ordered, grid) / len(ordered) - np.searchsorted(other, grid) / len(other)).max()
    )


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


DRAWN = np.random.default_rng(1)
CASES: dict[str, tuple[Distribution, np.ndarray]] = {
    "uniform": (EVENLY, DRAWN.random(COUNT)),
    "range": (uniform(0.2, 0.7), DRAWN.uniform(0.2, 0.7, COUNT)),
    "logit-normal": (logit_normal(-0.5, 0.8), sigmoid(DRAWN.normal(-0.5, 0.8, COUNT))),
    "beta": (beta(1.5, 3.0), DRAWN.beta(1.5, 3.0, COUNT)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_million_draws(name: str) -> None:
    distribution, expected = CASES[name]
    positions = distribution(UNIFORMS)
    assert positions.min() >= 0 and positions.max() < 1
    assert distance(positions, expected) < 2 * CLOSE
    assert (distribution(UNIFORMS.sort().values).diff() >= 0).all()


def test_a_range_of_another_distribution() -> None:
    positions = logit_normal(0.0, 1.0, low=0.3, high=0.6)(UNIFORMS)
    expected = sigmoid(DRAWN.normal(0.0, 1.0, 4 * COUNT))
    expected = expected[(expected >= 0.3) & (expected < 0.6)]
    assert positions.min() >= 0.3 and positions.max() < 0.6
    assert distance(positions, expected) < 2 * CLOSE


def test_laplace_is_over_the_log_snr() -> None:
    """Of flow matching, whose ln(SNR) = 2 ln((1 - s) / s) is known."""
    positions = laplace(flow().log_snr, 1.0, 0.5)(UNIFORMS)
    assert distance(2 * torch.log((1 - positions) / positions), DRAWN.laplace(1.0, 0.5, COUNT)) < 2 * CLOSE


def test_aligned_with_flow_trains_its_noise_levels() -> None:
    """noise / (signal + noise) at the drawn positions is flow's time, up to the steps of the schedule."""
    for prediction, shift in ((epsilon(), 1.0), (v_prediction(with_zero_terminal_snr=True), 2.5)):
        flows = logit_normal(0.0, 1.0)
        mixture = prediction.mix(aligned_with_flow(prediction.log_snr, flows, shift)(UNIFORMS[:20_000]))
        found = mixture.noise / (mixture.signal + mixture.noise)
        s = flows(UNIFORMS[:20_000])
        expected = shift * s / (1 + (shift - 1) * s)
        inside = (expected > 0.05) & (expected < 0.93)  # epsilon's schedule ends at 0.935
        assert (found - expected)[inside].abs().max() < 1e-2


def test_by_weights() -> None:
    weights = torch.tensor([1.0, 0.0, 3.0, 2.0], dtype=torch.float64)
    positions = by_weights(weights)(UNIFORMS)
    shares = torch.histc(positions, 4, 0, 1) / COUNT
    torch.testing.assert_close(shares, weights / 6, rtol=0, atol=2e-3)


def test_strata_cover_a_step_whatever_its_cut() -> None:
    """One position in each of the n parts; a sample's is the same in any batch; over many steps all are uniform."""
    places = torch.randperm(16, generator=torch.Generator().manual_seed(2))
    numbers = stratified(UNIFORMS[:16], places, 16)
    assert sorted((numbers * 16).long().tolist()) == list(range(16))
    assert torch.equal(stratified(UNIFORMS[4:7], places[4:7], 16), numbers[4:7])
    many = stratified(UNIFORMS, torch.arange(COUNT) % 16, 16)
    assert distance(many, DRAWN.random(COUNT)) < 2 * CLOSE
    spread = torch.stack([EVENLY(stratified(UNIFORMS[i : i + 16], torch.arange(16), 16)).mean() for i in range(500)])
    assert spread.std() < 0.25 * torch.stack([UNIFORMS[i * 16 : i * 16 + 16].mean() for i in range(500)]).std()

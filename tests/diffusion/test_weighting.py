"""Weights against the papers' formulas for each prediction, and finite everywhere."""

import itertools

import pytest
import torch

from trainer.diffusion.losses import absolute, constant_delta, exponential_delta, huber, smooth_l1, snr_delta, squared
from trainer.diffusion.objective import Objective, mixed_target
from trainer.diffusion.prediction import Prediction, edm, epsilon, flow, v_prediction
from trainer.diffusion.weighting import (
    Weighting,
    debiased,
    like_epsilon,
    like_flow,
    like_v,
    min_snr,
    p2,
    soft_min_snr,
    unweighted,
)

PREDICTIONS = {
    "epsilon": epsilon(),
    "v": v_prediction(),
    "v, zero terminal SNR": v_prediction(with_zero_terminal_snr=True),
    "flow": flow(),
    "shifted flow": flow(3.0),
    "edm": edm(),
}
WEIGHTINGS: dict[str, Weighting] = {
    "none": unweighted,
    "min_snr": min_snr(5.0),
    "soft_min_snr": soft_min_snr(5.0),
    "debiased": debiased,
    "p2": p2(1.0, 1.0),
    "like_epsilon": like_epsilon,
    "like_v": like_v,
    "like_flow": like_flow,
}
TIMESTEPS = torch.tensor([0, 1, 250, 500, 900, 998])


def snr_at(timesteps: torch.Tensor) -> torch.Tensor:
    """In float64, from the betas."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, dim=0)[timesteps]
    return alphas / (1 - alphas)


def test_papers_formulas() -> None:
    snr, one = snr_at(TIMESTEPS), torch.ones(6, dtype=torch.float64)
    clipped = torch.minimum(snr, 5 * one)
    expected = {
        ("epsilon", "min_snr"): clipped / snr,
        ("v", "min_snr"): clipped / (snr + 1),
        ("epsilon", "soft_min_snr"): 5 / (snr + 5),
        ("v", "soft_min_snr"): snr * 5 / (snr + 5) / (snr + 1),
        ("epsilon", "debiased"): 1 / snr.sqrt(),
        ("v", "debiased"): snr.sqrt() / (snr + 1),
        ("epsilon", "p2"): 1 / (1 + snr),
        ("v", "p2"): snr / (1 + snr) ** 2,
        ("epsilon", "like_epsilon"): one,
        ("v", "like_epsilon"): snr / (snr + 1),
        ("epsilon", "like_v"): (snr + 1) / snr,
        ("v", "like_v"): one,
        ("epsilon", "like_flow"): (1 + snr.sqrt()) ** 2 / snr,
        ("v", "like_flow"): (1 + snr.sqrt()) ** 2 / (snr + 1),
    }
    for (prediction, weighting), weights in expected.items():
        found = WEIGHTINGS[weighting](PREDICTIONS[prediction].at_timestep(TIMESTEPS))
        torch.testing.assert_close(found, weights, rtol=2e-4, atol=0, msg=f"{prediction}, {weighting}")
    s = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    of_flow = (1 - s) ** 2 / s**2
    torch.testing.assert_close(min_snr(5.0)(flow().mix(s)), torch.minimum(of_flow, 5 * one[:3]) * s**2)
    torch.testing.assert_close(like_flow(flow().mix(s)), one[:3])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_weighted_loss_counts_the_same_error_of_the_image_alike(weighting: str) -> None:
    """An error e of x0 gives the same loss, whatever of it was predicted: w(SNR) e^2."""
    if weighting == "none":
        return
    positions = (TIMESTEPS[1:5].double() + 0.5) / 1000
    errors = []
    for name in ("epsilon", "v"):
        mixture = PREDICTIONS[name].mix(positions)
        errors.append(WEIGHTINGS[weighting](mixture) / mixture.error**2)
    torch.testing.assert_close(errors[0], errors[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("prediction", "weighting"), list(itertools.product(PREDICTIONS, WEIGHTINGS)))
def test_finite_at_both_ends(prediction: str, weighting: str) -> None:
    """Also where nothing of the image, or of the noise, is left; and so are the losses, all of Huber's included."""
    chosen: Prediction = PREDICTIONS[prediction]
    ends = torch.tensor([0.0, 1e-9, 0.0005, 0.9995, 1 - 1e-16], dtype=torch.float64)
    mixture = chosen.mix(ends)
    latents, noise, answer = torch.randn(3, 5, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    for loss in (squared, absolute, huber, smooth_l1):
        for delta in (constant_delta(0.1), exponential_delta(0.1), snr_delta(0.1)):
            objective = Objective(chosen, weigh=WEIGHTINGS[weighting], loss=loss, delta=delta)
            losses = objective.losses(answer, mixed_target(mixture, latents, noise), mixture)
            assert losses.isfinite().all() and (losses >= 0).all()


def test_hubers_losses_and_their_schedules() -> None:
    """In float64 by their formulas; between L2 and L1; delta by noise level as sd-scripts schedules it."""
    answer, target = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(1))
    delta = torch.tensor([0.1, 1.0, 1e4]).view(-1, 1, 1, 1)
    d, e = delta.double(), (answer.double() - target.double())
    torch.testing.assert_close(
        huber(answer, target, delta)[:2].double(), (2 * d * ((e**2 + d**2).sqrt() - d))[:2], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        smooth_l1(answer, target, delta)[:2].double(), (2 * ((e**2 + d**2).sqrt() - d))[:2], rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(squared(answer, target, delta), e.square().float())
    torch.testing.assert_close(absolute(answer, target, delta), e.abs().float())
    mixture = epsilon().at_timestep(TIMESTEPS)
    sigma = snr_at(TIMESTEPS).rsqrt()
    torch.testing.assert_close(snr_delta(0.1)(mixture).double(), 0.9 / (1 + sigma) ** 2 + 0.1, rtol=1e-5, atol=0)
    expected = torch.exp(torch.log(torch.tensor(0.1, dtype=torch.float64)) * (TIMESTEPS.double() + 0.5) / 1000)
    torch.testing.assert_close(exponential_delta(0.1)(mixture).double(), expected, rtol=1e-5, atol=0)

"""Inputs and targets against diffusers' schedulers, and against the papers' formulas in float64."""

import math

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from trainer.diffusion.objective import mixed_input, mixed_target
from trainer.diffusion.prediction import Prediction, edm, epsilon, flow, shifted, v_prediction
from trainer.diffusion.schedule import scaled_linear, zero_terminal_snr

TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])
LATENTS, NOISE = torch.randn(2, 5, 4, 8, 6, generator=torch.Generator().manual_seed(5))
SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def scheduler_of(prediction: Prediction) -> DDPMScheduler:
    return DDPMScheduler(**SDXL, rescale_betas_zero_snr=prediction.zero_terminal_snr)


@pytest.mark.parametrize("prediction", [epsilon(), v_prediction(), v_prediction(with_zero_terminal_snr=True)])
def test_input_and_target_are_those_of_diffusers_scheduler(prediction: Prediction) -> None:
    scheduler, mixture = scheduler_of(prediction), prediction.at_timestep(TIMESTEPS)
    assert torch.equal(mixture.timesteps, TIMESTEPS)
    noisy = scheduler.add_noise(LATENTS, NOISE, TIMESTEPS)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(mixed_input(mixture, LATENTS, NOISE), noisy, rtol=0, atol=2e-6)
    target = mixed_target(mixture, LATENTS, NOISE)
    if prediction.kind == "epsilon":
        assert torch.equal(mixed_input(mixture, LATENTS, NOISE), noisy) and torch.equal(target, NOISE)
    else:
        velocity = scheduler.get_velocity(LATENTS, NOISE, TIMESTEPS)  # pyright: ignore[reportArgumentType]
        torch.testing.assert_close(target, velocity, rtol=0, atol=2e-6)


def test_zero_terminal_snr_is_diffusers() -> None:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    expected = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    found = zero_terminal_snr(scaled_linear()).alphas_cumprod
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert found[-1] == 0 and found[0].item() == pytest.approx(scaled_linear().alphas_cumprod[0].item(), rel=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_is_diffusers_flow_matching(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    at = [0, 10, 500, 900, 999]
    s = torch.arange(1000, 0, -1, dtype=torch.float64)[at] / 1000
    mixture = flow(shift).mix(s)
    told = scheduler.timesteps[at]
    torch.testing.assert_close(mixture.timesteps, told, rtol=1e-5, atol=1e-3)
    noisy = scheduler.scale_noise(LATENTS, told, NOISE)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(mixed_input(mixture, LATENTS, NOISE), noisy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed_target(mixture, LATENTS, NOISE), NOISE - LATENTS)
    assert shifted(torch.tensor(0.25, dtype=torch.float64), 3.0).item() == pytest.approx(0.5)


def test_edm_is_its_papers_preconditioning() -> None:
    """From F's target, D = c_skip x + c_out F is the image; the input has variance 1 if the image has sigma_data^2."""
    mixture = edm().mix(torch.tensor([0.02, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64))
    for row in range(5):
        sigma = mixture.noise[row].item()
        c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
        x = LATENTS[row] + sigma * NOISE[row]
        seen = mixed_input(mixture, LATENTS, NOISE)[row]
        torch.testing.assert_close(seen, x / math.sqrt(sigma**2 + 0.25), rtol=1e-5, atol=1e-5)
        target = mixed_target(mixture, LATENTS, NOISE)[row]
        torch.testing.assert_close(c_skip * x + c_out * target, LATENTS[row], rtol=1e-3, atol=2e-3)
        assert mixture.timesteps[row].item() == pytest.approx(math.log(sigma) / 4, rel=1e-5)
        assert (mixture.input_signal[row] * 0.5) ** 2 + mixture.input_noise[row] ** 2 == pytest.approx(1.0, rel=1e-5)
    drawn = edm().mix(torch.rand(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).noise.log()
    assert drawn.mean().item() == pytest.approx(-1.2, abs=0.02) and drawn.std().item() == pytest.approx(1.2, rel=0.02)


@pytest.mark.parametrize(
    "prediction", [epsilon(), v_prediction(), v_prediction(with_zero_terminal_snr=True), flow(), flow(3.0), edm()]
)
def test_an_error_of_the_target_is_so_much_of_an_error_of_the_image(prediction: Prediction) -> None:
    """Solved for x0 from input and target in float64, numerically: no formula of the module's."""
    positions = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
    mixture = prediction.mix(positions)
    for row in range(3):
        names = ("input_signal", "input_noise", "target_signal", "target_noise")
        a, b, c, d = (getattr(mixture, name)[row].double().item() for name in names)
        image_and_noise = torch.linalg.inv(torch.tensor([[a, b], [c, d]], dtype=torch.float64))
        assert abs(image_and_noise[0, 1].item()) == pytest.approx(mixture.error[row].item(), rel=1e-4)
        ratio = (mixture.signal[row] / mixture.noise[row]).item()
        assert a / b == pytest.approx(ratio, rel=1e-5)
    falling = prediction.log_snr(torch.linspace(0.001, 0.998, 500, dtype=torch.float64))
    assert (falling.diff() <= 0).all() and falling[0] > falling[-1] + 3

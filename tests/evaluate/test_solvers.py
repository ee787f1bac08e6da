"""Samplers against diffusers' schedulers in float32, and against a second derivation in float64."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config.sections.samples_config import SamplerName, ScheduleName
from trainer.diffusion.prediction import Prediction, edm, epsilon, flow, v_prediction
from trainer.errors import UserError
from trainer.evaluate.samplers import denoised, euler_steps

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers

SDXL: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}
PREDICTIONS: dict[str, tuple[Prediction, dict[str, Any]]] = {
    "epsilon": (epsilon(), {"prediction_type": "epsilon", **LEADING}),
    "v": (v_prediction(), {"prediction_type": "v_prediction", **LEADING}),
    "zero terminal SNR": (
        v_prediction(with_zero_terminal_snr=True),
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
    ),
}


def noise_of(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def network(kind: str) -> Callable[[Tensor, float], Tensor]:
    """A smooth function whose answers are of the size of a network's, and lead somewhere."""
    goal = noise_of(99, torch.float64)

    def model(latents: Tensor, timestep: float) -> Tensor:
        share = timestep / 1000
        wave = 0.1 * (3 * latents + timestep / 90).sin()
        if kind == "epsilon":
            return latents * math.sqrt(share) - 0.2 * goal.to(latents) + wave
        return (1 - share) * latents - share * goal.to(latents) + wave

    return model


def scheduler_of(sampler: SamplerName, schedule: ScheduleName, settings: dict[str, Any]) -> Any:
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler

    if sampler == "euler_a":
        return EulerAncestralDiscreteScheduler(**SDXL, **settings)
    if sampler == "ddim":
        return DDIMScheduler(**SDXL, **settings, clip_sample=False, set_alpha_to_one=False)
    wish = {"algorithm_type": "dpmsolver++", "solver_order": 2, "use_karras_sigmas": schedule == "karras"}
    return DPMSolverMultistepScheduler(**SDXL, **settings, **wish)


def drawn_by_diffusers(
    scheduler: Any, model: Callable[[Tensor, float], Tensor], noise: Tensor, steps: int, timesteps: list[int] | None
) -> Tensor:
    scheduler.set_timesteps(**({"timesteps": timesteps} if timesteps else {"num_inference_steps": steps}))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)  # as pipelines do; a timestep may stand there twice
    latents = noise * scheduler.init_noise_sigma
    for step, timestep in enumerate(scheduler.timesteps):
        answer = model(scheduler.scale_model_input(latents, timestep), float(timestep))
        more = {"generator": torch.Generator().manual_seed(step)} if "Ancestral" in type(scheduler).__name__ else {}
        latents = scheduler.step(answer, timestep, latents, **more).prev_sample
    return latents


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 20, 50])
@pytest.mark.parametrize(
    ("sampler", "schedule"),
    [("euler_a", "normal"), ("ddim", "normal"), ("dpmpp_2m", "normal"), ("dpmpp_2m", "karras")],
)
def test_samplers_are_diffusers(kind: str, steps: int, sampler: SamplerName, schedule: ScheduleName) -> None:
    prediction, settings = PREDICTIONS[kind]
    model, noise = network(prediction.kind), noise_of(1)
    found = denoised(prediction, model, noise, steps, sampler, schedule, fresh_noise=noise_of)
    timesteps, _ = euler_steps(prediction.schedule, steps, trailing=prediction.zero_terminal_snr)
    # diffusers' own spacing for DPM-Solver counts one step more than the others'.
    given = timesteps if (sampler, schedule) == ("dpmpp_2m", "normal") else None
    expected = drawn_by_diffusers(scheduler_of(sampler, schedule, settings), model, noise, steps, given)
    assert found.dtype == torch.float32 and 0.1 < float(found.std()) < 30
    scale = max(float(expected.abs().max()), 1.0)
    # In its first step, from a noise level of 4,096, diffusers takes the difference of numbers of that size.
    lost = 4096 * 2.0**-23 if steps <= 2 and prediction.zero_terminal_snr and sampler == "euler_a" else 0.0
    torch.testing.assert_close(found / scale, expected / scale, rtol=0, atol=max(1e-4, lost))


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ddim_in_float64_is_diffusers(kind: str) -> None:
    prediction, settings = PREDICTIONS[kind]
    model, noise = network(prediction.kind), noise_of(1, torch.float64)
    scheduler = scheduler_of("ddim", "normal", settings)
    scheduler.alphas_cumprod = prediction.schedule.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    expected = drawn_by_diffusers(scheduler, model, noise, 25, None)
    torch.testing.assert_close(denoised(prediction, model, noise, 25, "ddim"), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("sampler", ["euler_a", "dpmpp_2m"])
def test_samplers_in_float64_are_their_formulas(kind: str, sampler: SamplerName) -> None:
    """k-diffusion's way of writing them: x0 + sigma n, and a denoiser as a function of sigma."""
    prediction, _ = PREDICTIONS[kind]
    model, noise, steps = network(prediction.kind), noise_of(1, torch.float64), 28
    timesteps, sigmas = euler_steps(prediction.schedule, steps, trailing=prediction.zero_terminal_snr)

    def image_of(x: Tensor, step: int) -> Tensor:
        sigma = sigmas[step]
        answer = model(x / (sigma**2 + 1) ** 0.5, timesteps[step])
        if prediction.kind == "epsilon":
            return x - sigma * answer
        return x / (sigma**2 + 1) - answer * sigma / (sigma**2 + 1) ** 0.5

    x, before = noise * (sigmas[0] ** 2 + 1) ** 0.5, None
    for step in range(steps):
        image, sigma, to = image_of(x, step), sigmas[step], sigmas[step + 1]
        if sampler == "euler_a":
            up = min(to, (to**2 * (sigma**2 - to**2) / sigma**2) ** 0.5)
            down = (to**2 - up**2) ** 0.5
            x = x + (x - image) / sigma * (down - sigma)
            if to:
                x = x + noise_of(step, torch.float64) * up
        elif before is None or not to:
            x = (to / sigma) * x + (1 - to / sigma) * image
        else:
            t, t_next, t_before = (-math.log(level) for level in (sigma, to, sigmas[step - 1]))
            r = (t - t_before) / (t_next - t)
            towards = (1 + 1 / (2 * r)) * image - (1 / (2 * r)) * before
            x = (to / sigma) * x - math.expm1(-(t_next - t)) * towards
        before = image
    found = denoised(prediction, model, noise, steps, sampler, fresh_noise=lambda s: noise_of(s, torch.float64))
    torch.testing.assert_close(found, x, rtol=1e-6, atol=1e-6)


def test_more_steps_of_any_sampler_lead_to_the_same_image() -> None:
    """But for the one that adds noise: they solve one equation."""
    model, noise = network("epsilon"), noise_of(1, torch.float64)
    exact = denoised(epsilon(), model, noise, 500)
    for sampler in ("ddim", "dpmpp_2m"):
        far, near = (denoised(epsilon(), model, noise, steps, sampler) for steps in (10, 250))
        assert float((near - exact).norm()) < 0.2 * float((far - exact).norm()), sampler


def test_fresh_noise_is_asked_for_by_step() -> None:
    asked: list[int] = []

    def fresh(step: int) -> Tensor:
        asked.append(step)
        return noise_of(step)

    denoised(epsilon(), network("epsilon"), noise_of(1), 5, "euler_a", fresh_noise=fresh)
    assert asked == [0, 1, 2, 3]  # the last step adds none


@pytest.mark.parametrize("prediction", [flow(), edm()], ids=["flow", "edm"])
@pytest.mark.parametrize("sampler", ["euler_a", "ddim", "dpmpp_2m"])
def test_other_predictions_are_eulers(prediction: Prediction, sampler: SamplerName) -> None:
    with pytest.raises(UserError, match=f"sampler {sampler}: {prediction.kind} is drawn by euler"):
        denoised(prediction, network("epsilon"), noise_of(1), 4, sampler)


def test_euler_is_what_it_was() -> None:
    """The steps of Euler's method as they were before there were other samplers, to the bit."""
    for prediction, _ in PREDICTIONS.values():
        model, noise, trailing = network(prediction.kind), noise_of(3), prediction.zero_terminal_snr
        timesteps, sigmas = euler_steps(prediction.schedule, 7, trailing=trailing)
        latents = noise * (sigmas[0] if trailing else (sigmas[0] ** 2 + 1) ** 0.5)
        for timestep, sigma, to in zip(timesteps, sigmas, sigmas[1:], strict=False):
            scale = (sigma**2 + 1) ** 0.5
            predicted = model(latents / scale, timestep)
            if prediction.kind == "v_prediction":
                predicted = predicted / scale + latents * (sigma / scale**2)
            latents = latents + (to - sigma) * predicted
        np.testing.assert_array_equal(denoised(prediction, model, noise, 7).numpy(), latents.numpy())

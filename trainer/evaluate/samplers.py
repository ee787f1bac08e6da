"""From noise to an image, for each prediction: by Euler's method, in the steps that diffusers' schedulers take, or by
another solver.

The model is a function of its input [1, 4, h, w] float32 and a timestep, and gives its prediction, guided if that is
wanted.
"""

from itertools import pairwise

import torch
from torch import Tensor

from trainer.config.sections.samples_config import SamplerName, ScheduleName
from trainer.diffusion.prediction import SIGMA_DATA, Prediction, shifted
from trainer.diffusion.schedule import NoiseSchedule
from trainer.errors import UserError
from trainer.evaluate.solvers import (
    FreshNoise,
    Model,
    Predicted,
    by_ddim,
    by_dpm_solver,
    by_euler_ancestral,
    karras_steps,
)

# Of the last timestep where nothing of the image is left, as diffusers has it: its alphas_cumprod is taken for 2^-24.
_LARGEST_SIGMA = (2.0**24 - 1) ** 0.5
_EDM = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0}  # of the paper and of diffusers' EDMEulerScheduler


def denoised(
    prediction: Prediction,
    model: Model,
    noise: Tensor,
    num_steps: int,
    sampler: SamplerName = "euler",
    schedule: ScheduleName = "normal",
    fresh_noise: FreshNoise | None = None,
) -> Tensor:
    """Scaled latents [1, 4, h, w] float32, from standard normal noise of that shape.

    Args:
        sampler: all of epsilon and v-prediction; Euler's method alone of the others. All evaluate the model where
            `euler_steps` says, if `schedule` is normal.
        schedule: of `dpmpp_2m`.
        fresh_noise: of `euler_a`.
    Raises:
        UserError: the sampler does not go with the prediction.
    """
    if prediction.kind in ("flow", "edm") and sampler != "euler":
        raise UserError(f"sampler {sampler}: {prediction.kind} is drawn by euler")
    if prediction.kind == "flow":
        return _by_flow(model, noise, num_steps, prediction.shift)
    if prediction.kind == "edm":
        return _by_edm(model, noise, num_steps)
    if sampler == "euler":
        return _by_schedule(prediction, model, noise, num_steps)
    levels, predicted = prediction.schedule, Predicted(model, prediction.kind == "v_prediction")
    if schedule == "karras":
        timesteps, sigmas = karras_steps(levels.sigmas.clamp(max=_LARGEST_SIGMA), num_steps)
    else:
        timesteps, sigmas = euler_steps(levels, num_steps, trailing=prediction.zero_terminal_snr)
    if sampler == "ddim":
        return by_ddim(predicted, noise, timesteps, levels)
    if sampler == "dpmpp_2m":
        return by_dpm_solver(predicted, noise, timesteps, sigmas)
    assert fresh_noise is not None, "euler_a adds noise in each step"
    return by_euler_ancestral(predicted, noise, timesteps, sigmas, fresh_noise)


def euler_steps(schedule: NoiseSchedule, num_steps: int, *, trailing: bool = False) -> tuple[list[int], list[float]]:
    """Where SDXL's Euler sampler evaluates the model, and the noise levels that it steps through.

    Euler's method on the probability flow in sigma = sqrt((1 - alphas_cumprod) / alphas_cumprod) (Karras et
    al. 2022, algorithm 1 without churn), at evenly spaced timesteps: those of diffusers' "leading" spacing with an
    offset of 1, or of "trailing", whose first is the last timestep (Lin et al. 2023, section 3.3).

    Returns:
        num_steps timesteps, falling, and num_steps + 1 sigmas, the last 0.
    """
    count = schedule.num_timesteps
    if trailing:
        timesteps = [round(count - count / num_steps * step) - 1 for step in range(num_steps)]
    else:
        timesteps = [count // num_steps * step + 1 for step in reversed(range(num_steps))]
    sigmas = schedule.sigmas.clamp(max=_LARGEST_SIGMA)
    return timesteps, [*sigmas[timesteps].tolist(), 0.0]


def guided(unconditional: Tensor, conditional: Tensor, scale: float, rescale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans 2022).

    Args:
        rescale: how far the result gets the standard deviation of the conditional prediction back (Lin et al. 2023,
            eq. 15 and 16); 0 for not at all.
    """
    result = unconditional + scale * (conditional - unconditional)
    if not rescale:
        return result
    axes = list(range(1, result.dim()))
    factor = conditional.std(dim=axes, keepdim=True) / result.std(dim=axes, keepdim=True)
    return result * (rescale * factor + (1 - rescale))


def _by_schedule(prediction: Prediction, model: Model, noise: Tensor, num_steps: int) -> Tensor:
    trailing = prediction.zero_terminal_snr
    timesteps, sigmas = euler_steps(prediction.schedule, num_steps, trailing=trailing)
    latents = noise * (sigmas[0] if trailing else (sigmas[0] ** 2 + 1) ** 0.5)
    for timestep, sigma, next_sigma in zip(timesteps, sigmas, sigmas[1:], strict=False):
        scale = (sigma**2 + 1) ** 0.5
        predicted = model(latents / scale, timestep)
        if prediction.kind == "v_prediction":
            # x = x0 + sigma n is the schedule's state times `scale`: n = (v + (state) sigma) / scale.
            predicted = predicted / scale + latents * (sigma / scale**2)
        latents = latents + (next_sigma - sigma) * predicted
    return latents


def _by_flow(model: Model, noise: Tensor, num_steps: int, shift: float) -> Tensor:
    times = shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift).tolist()
    latents = noise
    for s, next_s in pairwise(times):
        latents = latents + (next_s - s) * model(latents, 1000 * s)
    return latents


def _by_edm(model: Model, noise: Tensor, num_steps: int) -> Tensor:
    """The noise levels of Karras et al. 2022, eq. 5."""
    rho = _EDM["rho"]
    most, least = _EDM["sigma_max"] ** (1 / rho), _EDM["sigma_min"] ** (1 / rho)
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    sigmas = [*((most + ramp * (least - most)) ** rho).tolist(), 0.0]
    latents = noise * sigmas[0]
    for sigma, next_sigma in pairwise(sigmas):
        total = sigma**2 + SIGMA_DATA**2
        timestep = float(torch.tensor(sigma).log() / 4)
        answer = model(latents / total**0.5, timestep)
        image = latents * (SIGMA_DATA**2 / total) + answer * (sigma * SIGMA_DATA / total**0.5)
        latents = latents + (next_sigma - sigma) * (latents - image) / sigma
    return latents

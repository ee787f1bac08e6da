"""From noise to an image along a noise schedule, by solvers other than Euler's.

Each is what diffusers' scheduler of the same name computes (0.42), with all coefficients in float64; the latents keep
their own dtype. Timesteps and noise levels sigma = sqrt((1 - a) / a) are given: where the solvers are evaluated is not
theirs to choose. `Predicted` turns the network's answer into the image and the noise that it stands for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.diffusion.schedule import NoiseSchedule

Model = Callable[[Tensor, float], Tensor]
FreshNoise = Callable[[int], Tensor]
"""Standard normal noise of a step, which is counted from 0: [1, 4, h, w]."""
_RHO = 7.0  # Karras et al. 2022, after eq. 5


@dataclass(frozen=True)
class Predicted:
    """The network as a function of the latents as a schedule has them, signal x0 + noise n, signal^2 + noise^2 = 1."""

    model: Model
    predicts_v: bool

    def image_and_noise(self, latents: Tensor, timestep: float, signal: float, noise: float) -> tuple[Tensor, Tensor]:
        """x0 and n as the network sees them."""
        answer = self.model(latents, timestep)
        if self.predicts_v:
            return signal * latents - noise * answer, signal * answer + noise * latents
        return (latents - noise * answer) / signal, answer


def karras_steps(sigmas_of: Tensor, num_steps: int) -> tuple[list[int], list[float]]:
    """The timesteps that come nearest to noise levels which are even in sigma^(1/7), from the largest to the smallest.

    Args:
        sigmas_of: the noise level of each timestep, rising; finite.
    Returns:
        num_steps timesteps, falling, and num_steps + 1 sigmas, the last 0.
    """
    least, most = (float(sigma) ** (1 / _RHO) for sigma in (sigmas_of[0], sigmas_of[-1]))
    ramp = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    sigmas = (most + ramp * (least - most)) ** _RHO
    logs, wanted = sigmas_of.double().log(), sigmas.log()
    # Between timesteps, the logarithm of the noise level is taken to be a line.
    low = (torch.searchsorted(logs, wanted, right=True) - 1).clamp(0, len(logs) - 2)
    share = ((wanted - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)
    return (low + share).round().long().tolist(), [*sigmas.tolist(), 0.0]


def by_euler_ancestral(
    predicted: Predicted, noise: Tensor, timesteps: Sequence[int], sigmas: Sequence[float], fresh_noise: FreshNoise
) -> Tensor:
    """Euler's method that goes down further than to the next noise level, and adds fresh noise up to it.

    k-diffusion's `sample_euler_ancestral` with eta 1; diffusers' EulerAncestralDiscreteScheduler. The state there is
    x0 + sigma n; here it is that over sqrt(sigma^2 + 1), in which no digits are lost at large noise levels.

    Args:
        noise: standard normal, [1, 4, h, w].
        sigmas: one more than timesteps, the last 0.
        fresh_noise: is not asked for the last step, which adds none.
    """
    latents = noise
    for step, timestep in enumerate(timesteps):
        sigma, to = sigmas[step], sigmas[step + 1]
        image, direction = predicted.image_and_noise(latents, timestep, *_shares(sigma))
        if not to:
            return image
        up = to * math.sqrt((sigma - to) * (sigma + to)) / sigma
        down = to * to / sigma
        latents = (image + down * direction + up * fresh_noise(step)) / math.sqrt(to * to + 1)
    return latents


def by_ddim(predicted: Predicted, noise: Tensor, timesteps: Sequence[int], schedule: NoiseSchedule) -> Tensor:
    """Song et al. 2021 (arXiv 2010.02502), eq. 12 without fresh noise; diffusers' DDIMScheduler.

    The last step leads to the schedule's first timestep, as for all of Stable Diffusion (`set_alpha_to_one: false`).
    """
    latents, alphas = noise, schedule.alphas_cumprod.double()
    for timestep, following in zip(timesteps, [*timesteps[1:], 0], strict=True):
        here, there = float(alphas[timestep]), float(alphas[following])
        image, direction = predicted.image_and_noise(latents, timestep, math.sqrt(here), math.sqrt(1 - here))
        latents = math.sqrt(there) * image + math.sqrt(1 - there) * direction
    return latents


def by_dpm_solver(predicted: Predicted, noise: Tensor, timesteps: Sequence[int], sigmas: Sequence[float]) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2); diffusers' DPMSolverMultistepScheduler.

    Order 2 with the midpoint rule; the first step and the last, which leads to no noise at all, are of order 1. The
    paper's lambda is -ln(sigma).
    """
    latents, before, last_h = noise, None, 0.0
    for step, timestep in enumerate(timesteps):
        sigma, to = sigmas[step], sigmas[step + 1]
        image, _ = predicted.image_and_noise(latents, timestep, *_shares(sigma))
        if not to:
            return image
        (_, noise_here), (signal, noise_there) = _shares(sigma), _shares(to)
        h, towards = math.log(sigma / to), image
        if before is not None:
            towards = image + (h / (2 * last_h)) * (image - before)
        latents = (noise_there / noise_here) * latents - signal * math.expm1(-h) * towards
        before, last_h = image, h
    return latents


def _shares(sigma: float) -> tuple[float, float]:
    """Signal and noise, whose squares add up to 1, with noise over signal = sigma."""
    scale = math.sqrt(sigma * sigma + 1)
    return 1 / scale, sigma / scale

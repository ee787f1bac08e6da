"""The noise schedule: how much of an image is left at each timestep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Cumulative product of 1 - beta over the timesteps of the forward process (DDPM, Ho et al. 2020, eq. 4)."""

    alphas_cumprod: Tensor  # [num_timesteps] float32, falling

    @property
    def num_timesteps(self) -> int:
        return len(self.alphas_cumprod)

    @property
    def sigmas(self) -> Tensor:
        """Noise over signal at each timestep, sqrt((1 - a) / a); infinite where no signal is left."""
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5


def scaled_linear(num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """Betas whose square roots lie on a line, as Stable Diffusion and SDXL were trained with (the defaults).

    Computed in float32 like the schedulers that sample from the model, so that both agree to the bit.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float32) ** 2
    return NoiseSchedule(torch.cumprod(1.0 - betas, dim=0))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Shifted and stretched so that nothing of the image is left at the last timestep, and the first is as it was.

    Lin et al. 2023 (arXiv 2305.08891), algorithm 1. Only what is not the noise itself can be predicted there.
    """
    roots = schedule.alphas_cumprod.sqrt()
    first, last = roots[0].clone(), roots[-1].clone()
    return NoiseSchedule(((roots - last) * (first / (first - last))) ** 2)

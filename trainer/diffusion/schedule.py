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

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule on `device`, so that looking up a timestep there needs no copy."""
        return NoiseSchedule(self.alphas_cumprod.to(device))


def scaled_linear(num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> NoiseSchedule:
    """Betas whose square roots lie on a line, as Stable Diffusion and SDXL were trained with (the defaults).

    Computed in float32 like the schedulers that sample from the model, so that both agree to the bit.
    """
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float32) ** 2
    return NoiseSchedule(torch.cumprod(1.0 - betas, dim=0))

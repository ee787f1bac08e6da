"""Random draws per sample: a sample's noise and timestep depend on its own seed and on nothing else.

Each sample has a generator of its own on the CPU, so a draw is the same on any device, in any batch, at
any number of workers. PyTorch's CPU generator keeps the low 32 bits of a seed: two samples in four
billion may share their draw, which does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw(
    draw_seeds: Tensor, shape: Sequence[int], num_timesteps: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Each sample's timestep, uniform over the schedule, and its standard normal noise.

    A sample's stream gives one float64 uniform for the timestep first, then the noise.

    Args:
        draw_seeds: [B] int64, not negative, on the CPU.
        shape: of one sample, such as (4, h, w).
        num_timesteps: timesteps are in range(num_timesteps).
    Returns:
        noise [B, *shape] float32 and timesteps [B] int64, both on `device`.
    """
    noise = torch.empty(len(draw_seeds), *shape)
    timesteps = torch.empty(len(draw_seeds), dtype=torch.int64)
    for row, seed in enumerate(draw_seeds.tolist()):
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand((), generator=generator, dtype=torch.float64).item()
        timesteps[row] = int(uniform * num_timesteps)
        torch.randn(tuple(shape), generator=generator, out=noise[row])
    return _moved(noise, device), _moved(timesteps, device)


def standard_normal(draw_seeds: Tensor, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Each sample's standard normal noise alone, where the timestep is given: [B, *shape] float32 on `device`.

    Args:
        draw_seeds: [B] int64, not negative, on the CPU.
        shape: of one sample, such as (4, h, w).
    """
    noise = torch.empty(len(draw_seeds), *shape)
    for row, seed in enumerate(draw_seeds.tolist()):
        torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), out=noise[row])
    return _moved(noise, device)


def _moved(drawn: Tensor, device: torch.device | str) -> Tensor:
    """On the device; a card does not keep the caller waiting until it has done what it still has to do."""
    if torch.device(device).type != "cuda":
        return drawn.to(device)
    return drawn.pin_memory().to(device, non_blocking=True)

"""Random draws per sample: what a sample is drawn depends on its own seed and on nothing else.

Each sample has a generator of its own on the CPU, so a draw is the same on any device, in any batch, at
any number of workers. PyTorch's CPU generator keeps the low 32 bits of a seed: two samples in four
billion may share their draw, which does no harm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NoiseRecipe:
    """What is added to plain noise.

    Attributes:
        offset: strength of a shift that all elements of a channel share (Guttenberg 2023); brighter and darker images.
        offset_probability: share of the samples that get it.
        offset_adaptive: the mean of the latents' channel, in absolute value, times this is added to `offset`.
        pyramid_levels, pyramid_discount: noise of that many coarser resolutions, each weaker than the last (Whitaker
            2023); 0 for none.
        perturbation: strength of a second noise that is added to the input alone (Ning et al. 2023, arXiv 2301.11706).
        candidates: that many noises are drawn, and the nearest to the image is taken (arXiv 2505.18521).
    """

    offset: float = 0.0
    offset_probability: float = 1.0
    offset_adaptive: float = 0.0
    pyramid_levels: int = 0
    pyramid_discount: float = 0.3
    perturbation: float = 0.0
    candidates: int = 1

    @property
    def has_offset(self) -> bool:
        """Whether any sample is shifted."""
        return self.offset > 0 or self.offset_adaptive > 0


PLAIN = NoiseRecipe()


@dataclass(frozen=True, eq=False)
class Draws:
    """What samples are drawn.

    Attributes:
        noise: standard normal, [B, *shape] float32 on the device, or [B, candidates, *shape].
        shift: standard normal [B, c, 1, 1], 0 for samples without an offset; None where nobody has one.
        perturbation: standard normal, [B, *shape]; None for none.
    """

    noise: Tensor
    shift: Tensor | None = None
    perturbation: Tensor | None = None


def draw(
    draw_seeds: Tensor,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    recipe: NoiseRecipe = PLAIN,
    noise_seeds: Tensor | None = None,
) -> tuple[Tensor, Draws]:
    """A sample's stream gives one float64 uniform for its position first, then the noise, then what the recipe adds.

    Args:
        draw_seeds: [B] int64, not negative, on the CPU.
        shape: of one sample, such as (4, h, w).
        noise_seeds: [B] int64, of whose streams all but the uniform number is; None: of each sample's own.
    Returns:
        A uniform number for each sample's position in the process, [B] float64 on the CPU, and its noise.
    """
    size, whole, channel = len(draw_seeds), tuple(shape), (shape[0], 1, 1)
    several = (recipe.candidates, *whole) if recipe.candidates > 1 else whole
    uniforms, noise = torch.empty(size, dtype=torch.float64), torch.empty(size, *several)
    shift = torch.zeros(size, *channel) if recipe.has_offset else None
    perturbation = torch.empty(size, *whole) if recipe.perturbation else None
    others = draw_seeds if noise_seeds is None else noise_seeds
    for row, (seed, other) in enumerate(zip(draw_seeds.tolist(), others.tolist(), strict=True)):
        generator = torch.Generator().manual_seed(seed)
        uniforms[row] = torch.rand((), generator=generator, dtype=torch.float64)
        if other != seed:
            generator.manual_seed(other)
            torch.rand((), generator=generator, dtype=torch.float64)
        torch.randn(several, generator=generator, out=noise[row])
        if recipe.pyramid_levels:
            noise[row] = _pyramid(noise[row], recipe, generator)
        if perturbation is not None:
            torch.randn(whole, generator=generator, out=perturbation[row])
        if shift is not None:
            own = torch.randn(channel, generator=generator)
            if torch.rand((), generator=generator).item() < recipe.offset_probability:
                shift[row] = own
    on_device = (None if extra is None else _moved(extra, device) for extra in (shift, perturbation))
    return uniforms, Draws(_moved(noise, device), *on_device)


def mixed_noise(draws: Draws, latents: Tensor, recipe: NoiseRecipe) -> tuple[Tensor, Tensor]:
    """The noise of the target and that of the input, [B, c, h, w] float32 each, the first of variance 1.

    Args:
        latents: scaled, on the draws' device.
    """
    noise = draws.noise
    if noise.dim() > latents.dim():
        distances = (noise - latents.unsqueeze(1)).square().flatten(2).sum(dim=2)
        noise = noise[torch.arange(len(noise), device=noise.device), distances.argmin(dim=1)]
    if draws.shift is not None:
        strength = recipe.offset + recipe.offset_adaptive * latents.mean(dim=(2, 3), keepdim=True).abs()
        added = strength * draws.shift
        # Of the samples that have a shift: two independent normal numbers are added.
        variance = 1 + (strength * (draws.shift != 0)) ** 2
        noise = (noise + added) / variance.sqrt()
    if draws.perturbation is None:
        return noise, noise
    return noise, noise + recipe.perturbation * draws.perturbation


def _pyramid(noise: Tensor, recipe: NoiseRecipe, generator: torch.Generator) -> Tensor:
    """[..., c, h, w] with coarser noise added, of variance 1 again; a level is 2 to 4 times coarser than the last."""
    height, width = noise.shape[-2:]
    total, shrinks = noise.clone(), 1.0
    for level in range(1, recipe.pyramid_levels + 1):
        shrinks *= 2 + 2 * torch.rand((), generator=generator).item()
        size = max(1, int(height / shrinks)), max(1, int(width / shrinks))
        coarse = torch.randn(*noise.shape[:-2], *size, generator=generator)
        coarse = coarse.view(-1, noise.shape[-3], *size)
        fine = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
        total += recipe.pyramid_discount**level * fine.view(noise.shape)
        if size == (1, 1):
            break
    # By what it is, its mean included: far coarser noise is nearly all mean.
    return total / total.square().mean(dim=(-3, -2, -1), keepdim=True).sqrt()


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

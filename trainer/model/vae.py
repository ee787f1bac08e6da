"""Pixels to latents and back. Latents cross this border unscaled, as the VAE gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from trainer.diffusion.noise import standard_normal

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: Tensor, draw_seeds: Tensor) -> Tensor:
    """One sample of the VAE's posterior per image, with noise that depends on the image's own seed alone.

    Args:
        pixels: [B, 3, H, W] float32 in -1..1, on any device.
        draw_seeds: [B] int64, not negative, on the CPU.
    Returns:
        [B, 4, H/8, W/8] float32 on the VAE's device, unscaled. Not finite where the VAE's precision
        overflowed, as SDXL's original VAE does in fp16; the caller checks.
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype), return_dict=False)[0]
    mean = posterior.mean.float()
    return mean + posterior.std.float() * standard_normal(draw_seeds, mean.shape[1:], mean.device)


@dataclass(frozen=True, eq=False)
class ImageEncoder:
    """A frozen VAE that encodes the images of each batch as they are trained on, a few at a time."""

    vae: AutoencoderKL
    batch_size: int

    def encode(self, pixels: Tensor, draw_seeds: Tensor) -> Tensor:
        """Unscaled latents [B, 4, H/8, W/8] float32 on the VAE's device, of uint8 images [B, 3, H, W].

        The same as `prepare` stores for these pixels and seeds, but for the rounding to fp16.
        """
        parts = []
        for images, seeds in zip(pixels.split(self.batch_size), draw_seeds.split(self.batch_size), strict=True):
            unit_range = images.to(self.vae.device, non_blocking=True).float() / 127.5 - 1.0
            parts.append(encode_latents(self.vae, unit_range, seeds))
        return torch.cat(parts)


@torch.no_grad()
def decode_latents(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images of unscaled latents, one at a time to bound the memory.

    Args:
        latents: [B, 4, h, w], any float dtype, on any device.
    Returns:
        [B, 8h, 8w, 3] uint8 on the CPU.
    """
    images = []
    for row in latents.to(vae.device, vae.dtype).split(1):
        image = vae.decode(row, return_dict=False)[0][0].float()  # pyright: ignore[reportArgumentType]
        images.append((image / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0).cpu())
    return torch.stack(images)

"""A UNet together with what its loss is made of; training and validation compute the loss by the same code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.diffusion.objective import Objective
from trainer.model.conditioning import unet_inputs
from trainer.model.text import TextConditioning, TextEncoders
from trainer.model.vae import ImageEncoder

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


@dataclass(frozen=True, eq=False)
class Denoiser:
    """What is trained or scored.

    Attributes:
        unet: the plain module, without a wrapper.
        objective: its schedule lies on the UNet's device.
        text_encoders: frozen; None where their outputs are cached with the data.
        image_encoder: the frozen VAE, where the data are images; None where they are latents.
        scaling_factor: latents of the VAE times this are what the UNet sees.
        autocast_dtype: arithmetic of the UNet; None: the precision of its weights.
    """

    unet: UNet2DConditionModel
    objective: Objective
    text_encoders: TextEncoders | None
    image_encoder: ImageEncoder | None
    scaling_factor: float
    autocast_dtype: torch.dtype | None


def image_losses(
    denoiser: Denoiser,
    model: nn.Module,
    latents: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    text: TextConditioning,
    time_ids: Tensor,
) -> Tensor:
    """The objective's loss of each image, [B] float32; every tensor lies on the UNet's device.

    Args:
        model: what is called: the denoiser's UNet, or the wrapper that reduces its gradients.
        latents: [B, 4, h, w] float16 or float32, unscaled.
        noise: [B, 4, h, w] float32.
        timesteps: [B] int64.
        time_ids: [B, 6] float32.
    """
    objective = denoiser.objective
    scaled = latents.float() * denoiser.scaling_factor
    noisy = objective.noisy_latents(objective.schedule, scaled, noise, timesteps)
    dtype = denoiser.autocast_dtype
    with torch.autocast(latents.device.type, dtype, enabled=dtype is not None):
        prediction = model(**unet_inputs(noisy, timesteps, text, time_ids))[0]
    return objective.loss(prediction, objective.target(objective.schedule, scaled, noise, timesteps))

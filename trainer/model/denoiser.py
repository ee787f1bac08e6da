"""What trains, as one module, together with what its loss is made of; training and validation compute it alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from trainer.adapters.initial_values import AdapterStart
from trainer.adapters.keyed_dropout import KeyedDropout
from trainer.diffusion.noise import Draws, mixed_noise
from trainer.diffusion.objective import Objective, mixed_input, mixed_target
from trainer.diffusion.prediction import Mixture
from trainer.model.conditioning import condition_text, unet_inputs
from trainer.model.new_tokens import NewTokenVectors
from trainer.model.selection.weight_rates import Rate
from trainer.model.text import TextConditioning, TextEncoders
from trainer.model.vae import ImageEncoder

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


class TrainedModel(nn.Module):
    """The UNet, and the text encoders if anything in them trains: one pass, so that a wrapper sees all weights.

    Parameters are named `unet.*`, `text_encoder_1.*`, `text_encoder_2.*` and `new_tokens.*`.

    Attributes:
        adapter: what trains in place of the weights themselves; None: they do.
        rates: how fast what trains does so, by the parameter's name.
        resting: names of those among them that train at another time of the run, and ask for no gradients now.
        dropout: of the adapter, which is told of each pass; None: there is none.
        new_tokens: vectors that the text encoders look up beside their own; None: there are none.
    """

    adapter: AdapterStart | None = None
    dropout: KeyedDropout | None = None

    def __init__(self, unet: UNet2DConditionModel, text_encoders: TextEncoders | None = None) -> None:
        super().__init__()
        self.unet = unet
        if text_encoders is not None:
            self.text_encoder_1 = text_encoders.one
            self.text_encoder_2 = text_encoders.two
        self.text_encoders = text_encoders
        self.new_tokens: NewTokenVectors | None = None
        self.rates: dict[str, Rate] = {}
        self.resting: frozenset[str] = frozenset()

    def forward(
        self,
        noisy_latents: Tensor,
        timesteps: Tensor,
        time_ids: Tensor,
        input_ids: Tensor | None = None,
        text_hidden: Tensor | None = None,
        text_pooled: Tensor | None = None,
    ) -> Tensor:
        """The UNet's prediction [B, 4, h, w], from token ids where the text encoders train, else from their outputs.

        Args:
            noisy_latents: [B, 4, h, w] in the dtype that the UNet computes with, or float32 under autocast.
            timesteps: [B] int64, or float32 of flow matching and EDM.
            time_ids: [B, 6] float32.
            input_ids: [B, 2, chunks, 77] int64.
            text_hidden, text_pooled: [B, positions, D] and [B, P].
        """
        if self.dropout is not None:
            self.dropout.note(noisy_latents, timesteps)
        if input_ids is not None:
            assert self.text_encoders is not None, "token ids need text encoders"
            text = self.text_encoders.encode(input_ids)
        else:
            assert text_hidden is not None and text_pooled is not None, "neither token ids nor what they give"
            text = TextConditioning(text_hidden, text_pooled)
        return self.unet(**unet_inputs(noisy_latents, timesteps, text, time_ids))[0]


@dataclass(frozen=True, eq=False)
class Denoiser:
    """What is trained or scored.

    Attributes:
        model: the plain module, without a wrapper.
        objective: what it is trained to predict, and how errors count.
        frozen_text_encoders: where text is encoded and no text encoder trains, else None.
        image_encoder: the frozen VAE, where the data are images; None where they are latents.
        scaling_factor, latent_shift: what the UNet sees is (latents of the VAE - shift) * factor.
        input_dtype: of the noisy latents that the model is called with.
        autocast_dtype: arithmetic of the model where its weights have another dtype; None: that of its weights.
    """

    model: TrainedModel
    objective: Objective
    frozen_text_encoders: TextEncoders | None
    image_encoder: ImageEncoder | None
    scaling_factor: float
    input_dtype: torch.dtype = torch.float32
    autocast_dtype: torch.dtype | None = None
    latent_shift: float = 0.0

    @property
    def unet(self) -> UNet2DConditionModel:
        """The UNet itself."""
        return self.model.unet

    @property
    def text_encoders(self) -> TextEncoders | None:
        """The text encoders as they are now; None where only their cached outputs are used."""
        return self.frozen_text_encoders or self.model.text_encoders


def text_arguments(
    denoiser: Denoiser,
    device: torch.device,
    input_ids: Tensor | None,
    text_hidden: Tensor | None,
    text_pooled: Tensor | None,
) -> dict[str, Tensor]:
    """What the model is called with of a batch's text, on `device`: token ids where the text encoders train.

    Args:
        input_ids: [B, 2, chunks, 77] int64, or None where the frozen encoders' outputs were cached.
        text_hidden, text_pooled: [B, positions, D] and [B, P] in the dtype they were cached in, or None.
    """
    if denoiser.model.text_encoders is not None:
        assert input_ids is not None, "text encoders that train need token ids"
        return {"input_ids": input_ids.to(device, non_blocking=True)}
    text = condition_text(denoiser.frozen_text_encoders, device, input_ids, text_hidden, text_pooled)
    return {"text_hidden": text.hidden, "text_pooled": text.pooled}


class Others(NamedTuple):
    """Another image of the step for each, unscaled [B, 4, h, w], and its noise."""

    latents: Tensor
    draws: Draws


def image_losses(
    denoiser: Denoiser,
    model: nn.Module,
    latents: Tensor,
    draws: Draws,
    mixture: Mixture,
    text: Mapping[str, Tensor],
    time_ids: Tensor,
    objective: Objective | None = None,
    others: Others | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """The objective's loss of each image, [B] float32; every tensor but the masks lies on the model's device.

    Args:
        model: what is called: the denoiser's model, or the wrapper that exchanges its gradients or weights.
        latents: [B, 4, h, w] float16 or float32, unscaled.
        draws: the images' noise.
        mixture: where in the process they are, its numbers for the network on that device.
        text: from `text_arguments`.
        time_ids: [B, 6] float32.
        objective: in place of the denoiser's.
        others: from which the prediction is to be told apart.
        masks: [B, h, w] uint8, where the objective's loss is masked.
    """
    objective = objective or denoiser.objective
    scaled = _scaled(denoiser, latents)
    noise, input_noise = mixed_noise(draws, scaled, objective.noise)
    noisy = mixed_input(mixture, scaled, input_noise).to(denoiser.input_dtype)
    dtype = denoiser.autocast_dtype
    with torch.autocast(latents.device.type, dtype, enabled=dtype is not None):
        prediction = model(noisy, mixture.timesteps, time_ids, **text)
    negative = None
    if others:
        scaled_others = _scaled(denoiser, others.latents)
        negative = mixed_target(mixture, scaled_others, mixed_noise(others.draws, scaled_others, objective.noise)[0])
    return objective.losses(prediction, mixed_target(mixture, scaled, noise), mixture, masks, negative)


def _scaled(denoiser: Denoiser, latents: Tensor) -> Tensor:
    """As the UNet sees them, float32."""
    return (latents.float() - denoiser.latent_shift) * denoiser.scaling_factor

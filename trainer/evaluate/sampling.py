"""Images drawn from the model as diffusers' SDXL pipeline draws them, each from its own seed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from trainer.config.sections.samples_config import MOST_STEPS, SamplerName, ScheduleName
from trainer.diffusion.noise import standard_normal
from trainer.diffusion.prediction import Prediction
from trainer.errors import UserError
from trainer.evaluate.samplers import denoised, guided
from trainer.keyed import draw_seed
from trainer.model.conditioning import time_ids, unet_inputs
from trainer.model.text import CaptionTokenizer, TextConditioning, TextEncoders
from trainer.model.vae import decode_latents


def sample_images(
    *,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoders: TextEncoders,
    tokenizer: CaptionTokenizer,
    prompts: Sequence[str],
    negative_prompt: str,
    width_px: int,
    height_px: int,
    num_steps: int,
    guidance_scale: float,
    seeds: Sequence[int],
    device: torch.device,
    prediction: Prediction,
    scaling_factor: float,
    latent_shift: float = 0.0,
    guidance_rescale: float = 0.0,
    zeros_for_no_text: bool = False,
    input_dtype: torch.dtype | None = None,
    autocast_dtype: torch.dtype | None = None,
    sampler: SamplerName = "euler",
    schedule: ScheduleName = "normal",
) -> list[Image.Image]:
    """Draws one image for each prompt with SDXL's own settings.

    The images are drawn one by one, so that an image hangs on its prompt and its seed alone, and not on
    what else is drawn: each rank may draw `prompts[rank::world]` without a word to the others. Training
    modes are as before afterwards.

    Args:
        unet: the bare model (not DDP's wrapper), on `device`.
        vae, text_encoders: each on any device, in the precision it is held in.
        prompts: one for each image.
        width_px, height_px: of every image; multiples of 8, the VAE's factor.
        num_steps: of the sampler; at most 500.
        guidance_scale: of classifier-free guidance (Ho and Salimans 2022); 1 or less turns it off.
        seeds: one for each image, of its starting noise, which is drawn on the CPU, and of what a sampler adds.
        device: of the UNet.
        prediction: what the UNet predicts.
        scaling_factor, latent_shift: what the UNet sees is (latents of the VAE - shift) * factor.
        guidance_rescale: as in `guided`.
        zeros_for_no_text: an empty negative prompt stands for zeros, as in diffusers; else for the empty text, as in
            A1111 and ComfyUI.
        input_dtype: of the latents that the UNet is called with, as in training; None: the precision of its weights.
        autocast_dtype: arithmetic of the UNet, as in training; None: the precision of its weights.
        sampler, schedule: as in `denoised`.

    Raises:
        UserError: a size is no multiple of the VAE's factor, there are too many steps, or as `denoised`.
        ValueError: `seeds` and `prompts` differ in length.
    """
    factor, images = _checked_factor(vae, width_px, height_px, num_steps), []
    with _evaluating(unet, vae, text_encoders.one, text_encoders.two), torch.inference_mode():
        sizes = time_ids((height_px, width_px), (0, 0), (height_px, width_px)).to(device)
        negative = None
        if guidance_scale > 1 and prompts:
            negative = text_encoders.encode(torch.from_numpy(tokenizer([negative_prompt])))
            if zeros_for_no_text and not negative_prompt:
                negative = TextConditioning(torch.zeros_like(negative.hidden), torch.zeros_like(negative.pooled))
        for prompt, seed in zip(prompts, seeds, strict=True):
            positive = text_encoders.encode(torch.from_numpy(tokenizer([prompt])))
            shape = (unet.config["in_channels"], height_px // factor, width_px // factor)
            noise = standard_normal(torch.tensor([seed]), shape, device)
            with torch.autocast(device.type, autocast_dtype, enabled=autocast_dtype is not None):
                dtype = input_dtype or unet.dtype
                texts = [positive] if negative is None else [negative, positive]
                model = partial(_predicted, unet, texts, sizes, guidance_scale, guidance_rescale, dtype)
                fresh = partial(_fresh_noise, seed, shape, device)
                latents = denoised(prediction, model, noise, num_steps, sampler, schedule, fresh)
            images += decoded_images(vae, latents / scaling_factor + latent_shift)
    return images


def _checked_factor(vae: AutoencoderKL, width_px: int, height_px: int, num_steps: int) -> int:
    """Pixels to a latent, along each side."""
    factor = 2 ** (len(vae.config["block_out_channels"]) - 1)
    if width_px % factor or height_px % factor:
        raise UserError(f"samples of {width_px} x {height_px} px: width and height must be multiples of {factor}")
    if not 1 <= num_steps <= MOST_STEPS:
        raise UserError(f"samples of {num_steps} steps: the sampler takes 1 to {MOST_STEPS} steps")
    return factor


def _fresh_noise(seed: int, shape: Sequence[int], device: torch.device, step: int) -> Tensor:
    """What an ancestral sampler adds in a step, a function of the image's seed and the step: [1, *shape] float32."""
    return standard_normal(torch.tensor([draw_seed("ancestral noise", seed, step)]), shape, device)


def decoded_images(vae: AutoencoderKL, latents: Tensor) -> list[Image.Image]:
    """RGB images of unscaled latents [n, 4, h, w] (any dtype and device), in the VAE's precision."""
    with _evaluating(vae), torch.inference_mode():
        return [Image.fromarray(levels.numpy()) for levels in decode_latents(vae, latents)]


def _predicted(
    unet: UNet2DConditionModel,
    texts: Sequence[TextConditioning],
    sizes: Tensor,
    guidance_scale: float,
    guidance_rescale: float,
    input_dtype: torch.dtype,
    latents: Tensor,
    timestep: float,
) -> Tensor:
    """What the UNet predicts of latents [1, 4, h, w], float32: led away from the first text where there are two."""
    device = latents.device
    hidden, pooled = (torch.cat(parts).to(device) for parts in zip(*((t.hidden, t.pooled) for t in texts), strict=True))
    model_input = latents.expand(len(texts), -1, -1, -1).to(input_dtype)
    at = torch.full((len(texts),), timestep, device=device)
    inputs = unet_inputs(model_input, at, TextConditioning(hidden, pooled), sizes.expand(len(texts), -1))
    answers = unet(**inputs)[0].float()
    if len(texts) == 1:
        return answers
    unconditional, conditional = answers.chunk(2)
    return guided(unconditional, conditional, guidance_scale, guidance_rescale)


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts models into evaluation mode, and each of their modules back into its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

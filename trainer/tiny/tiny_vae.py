"""A small VAE of SDXL's shape (4 latent channels, an eighth of the side) that a minute of training makes usable.

Random weights take long to learn as little as the colours, because each group norm hides brightness. So
the weights start as an exact linear autoencoder: the means of 8 x 8 pixels on the way in, bilinear
interpolation on the way out, all residual branches silent. Training then adds the detail.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

SCALING_FACTOR = 0.13025  # SDXL's: latents have a standard deviation of 7.7 before it, and 1 after
_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (16, 32, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "sample_size": 256,
    "scaling_factor": SCALING_FACTOR,
    "mid_block_add_attention": False,
}
_CONSTANT = 6.0  # size of the two constant channels beside the colours; large against the colours' -1..1
_CROP_PX, _CROPS = 64, 3
_LAST_CROP_PX, _LAST_CROPS, _LAST_SHARE = (
    96,
    2,
    0.1,
)  # group norms see larger images in use: the last steps train on such
_PEAK_LR, _WARMUP_SHARE, _KL_WEIGHT = 4e-4, 0.15, 5e-3


def make_tiny_vae(seed: int) -> AutoencoderKL:
    """An untrained VAE: it reconstructs colours and shapes, blurred by the factor 8; latents are scaled roughly."""
    vae = _start(seed)
    _normalize_latents(vae, torch.zeros(4), 0.25 * torch.eye(4), torch.full((4,), 1e-4))
    return vae


def _start(seed: int) -> AutoencoderKL:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(**_VAE)
    _start_linear(vae)
    return vae


@torch.no_grad()
def _start_linear(vae: AutoencoderKL) -> None:
    """Make the VAE carry the colours and their negatives through channels 0 to 5, untouched by norms and SiLU.

    A pair gives silu(a) - silu(-a) = a. With its negatives and two opposite constants in its group, a colour
    meets a group norm whose mean is 0 and whose deviation hardly depends on the image.
    """
    from diffusers.models.resnet import ResnetBlock2D

    signs = torch.cat([torch.eye(3), -torch.eye(3)])
    # The blocks' own types say little: each is a Module that may be a Tensor.
    encoder: Any = vae.encoder
    decoder: Any = vae.decoder
    quant: Any = (vae.quant_conv, vae.post_quant_conv)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            for parameter in module.conv2.parameters():
                nn.init.zeros_(parameter)
            if module.conv_shortcut is not None:
                _carry(module.conv_shortcut, torch.ones(1, 1))
    mean_of_four = F.pad(torch.full((2, 2), 0.25), (0, 1, 0, 1))
    bilinear = torch.tensor([0.25, 0.5, 0.25]).outer(torch.tensor([0.25, 0.5, 0.25]))
    for block in encoder.down_blocks:
        for sampler in block.downsamplers or ():
            _carry(sampler.conv, mean_of_four)
    for block in decoder.up_blocks:
        for sampler in block.upsamplers or ():
            _carry(sampler.conv, bilinear)
    for half, last in ((encoder, encoder.mid_block.resnets[-1]), (decoder, decoder.up_blocks[-1].resnets[-1])):
        half.conv_in.weight[:6], half.conv_in.bias[:6] = 0, 0
        half.conv_in.weight[:6, :3, 1, 1] = signs
        last.conv2.bias[6], last.conv2.bias[7] = _CONSTANT, -_CONSTANT
        channels_per_group = half.conv_norm_out.num_channels // half.conv_norm_out.num_groups
        half.conv_norm_out.weight[:6] = _CONSTANT * math.sqrt(2 / channels_per_group)
        half.conv_out.weight[:3], half.conv_out.bias[:3] = 0, 0
        half.conv_out.weight[:3, :6, 1, 1] = signs.T
    encoder.conv_out.weight[3] *= 0.3
    encoder.conv_out.weight[4:] *= 0.1
    encoder.conv_out.bias[4:] = -6.0
    for conv in quant:
        conv.weight.copy_(torch.eye(conv.in_channels)[:, :, None, None])
        conv.bias.zero_()


def _carry(conv: nn.Module, kernel: Tensor) -> None:
    """Let channels 0 to 5 of a convolution see themselves alone, through `kernel`."""
    assert isinstance(conv, nn.Conv2d) and conv.bias is not None
    conv.weight[:6], conv.bias[:6] = 0, 0
    for channel in range(6):
        conv.weight[channel, channel] = kernel


def train_tiny_vae(images: Sequence[np.ndarray], steps: int, seed: int, show_progress: bool = True) -> AutoencoderKL:
    """Train a VAE on random crops and scale its latents to the mean variance 1 / `SCALING_FACTOR`^2.

    Args:
        images: [H, W, 3] uint8, no side under 96 px.
        steps: optimizer steps of AdamW on three crops of 64 x 64 px, at the end on two of 96 x 96 px; about
            0.06 CPU seconds each. 0 scales the latents alone.
        seed: of the weights, the crops and the posterior's noise. With equal threads, equal results.
    """
    vae: Any = _start(seed).train()
    vae.to(memory_format=torch.channels_last)
    pixels = [torch.from_numpy(image).permute(2, 0, 1) for image in images]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_PEAK_LR, betas=(0.9, 0.99), weight_decay=1e-4, fused=True)
    bar = tqdm(range(steps), desc="VAE", unit="step", disable=None if show_progress else True)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _PEAK_LR * _lr_ratio(step / steps, 1 / steps)
        is_late = step >= steps * (1 - _LAST_SHARE)
        count, side_px = (_LAST_CROPS, _LAST_CROP_PX) if is_late else (_CROPS, _CROP_PX)
        batch = _random_crops(pixels, count, side_px, generator)
        posterior = vae.encode(batch, return_dict=False)[0]
        decoded = vae.decode(posterior.sample(generator), return_dict=False)[0]
        kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        loss = _reconstruction_loss(decoded, batch) + _KL_WEIGHT * kl
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    vae.eval().to(memory_format=torch.contiguous_format)
    _normalize_latents(vae, *_latent_statistics(vae, pixels))
    return vae


def _lr_ratio(done: float, step: float) -> float:
    """Linear warm-up and half a cosine, as functions of the share of the training that is done."""
    return min(1.0, (done + step) / _WARMUP_SHARE) * (1 + math.cos(math.pi * done)) / 2


def _random_crops(pixels: list[Tensor], count: int, side_px: int, generator: torch.Generator) -> Tensor:
    crops = []
    for index in torch.randint(len(pixels), (count,), generator=generator).tolist():
        height, width = pixels[index].shape[1:]
        top, left = (
            torch.rand(2, generator=generator) * torch.tensor([height - side_px + 1, width - side_px + 1])
        ).int()
        crops.append(pixels[index][:, top : top + side_px, left : left + side_px])
    return _to_unit_range(torch.stack(crops)).contiguous(memory_format=torch.channels_last)


def _to_unit_range(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def _reconstruction_loss(decoded: Tensor, pixels: Tensor) -> Tensor:
    """L1 and L2 of the pixels, L1 of the differences between neighbours (edges), L1 at a half and a quarter."""
    error = decoded - pixels
    loss = error.abs().mean() + error.square().mean()
    loss = loss + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean())
    for _ in range(2):
        error = F.avg_pool2d(error, 2)
        loss = loss + 0.5 * error.abs().mean()
    return loss


@torch.no_grad()
def _latent_statistics(vae: AutoencoderKL, pixels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [4] and covariance [4, 4] of the latents, and mean variance [4] of the posteriors, over every 4th image."""
    means, variances = [], []
    for image in pixels[::4]:
        height, width = (side // 8 * 8 for side in image.shape[1:])
        posterior = vae.encode(_to_unit_range(image[None, :, :height, :width]), return_dict=False)[0]
        means.append(posterior.mean[0].flatten(1))
        variances.append(posterior.var[0].flatten(1))
    latents = torch.cat(means, dim=1)
    return latents.mean(dim=1), torch.cov(latents), torch.cat(variances, dim=1).mean(dim=1)


@torch.no_grad()
def _normalize_latents(vae: AutoencoderKL, mean: Tensor, covariance: Tensor, posterior_variance: Tensor) -> None:
    """Fold an affine map into the two 1 x 1 convolutions around the latents, and its inverse.

    After it, latents times `SCALING_FACTOR` have mean 0, a diagonal covariance of mean 1, and the posterior's variance
    is the same everywhere. Channels keep their share: were they all of deviation 1, three quarters of a diffusion
    loss would be about detail that hardly shows.
    """
    into, out_of = vae.quant_conv, vae.post_quant_conv
    assert into is not None and into.bias is not None and out_of is not None and out_of.bias is not None
    variances, axes = torch.linalg.eigh(covariance.double())
    divisor = variances.mean().sqrt() * SCALING_FACTOR
    rotate = (axes.T / divisor).float()  # [4, 4], rows are the new channels
    rotate_back = (axes * divisor).float()
    into.weight[:4] = torch.einsum("ij,jkhw->ikhw", rotate, into.weight[:4])
    into.bias[:4] = rotate @ (into.bias[:4] - mean)
    into.weight[4:] = 0
    into.bias[4:] = (rotate.square() @ posterior_variance).log()
    out_of.bias += torch.einsum("ijhw,j->i", out_of.weight, mean)
    out_of.weight.copy_(torch.einsum("ijhw,jk->ikhw", out_of.weight, rotate_back))


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, images: Sequence[np.ndarray]) -> float:
    """Mean over the images of the peak signal-to-noise ratio in dB after encoding and decoding."""
    ratios = []
    for image in images:
        height, width = (side // 8 * 8 for side in image.shape[:2])
        pixels = _to_unit_range(torch.from_numpy(image[None, :height, :width]).permute(0, 3, 1, 2))
        latents: Any = vae.encode(pixels, return_dict=False)[0].mean
        decoded: Any = vae.decode(latents, return_dict=False)[0]
        error = F.mse_loss(decoded.clamp(-1, 1), pixels)
        ratios.append(10 * math.log10(4 / error.item()))
    return sum(ratios) / len(ratios)

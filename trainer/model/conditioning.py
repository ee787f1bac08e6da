"""SDXL's micro-conditioning, and the UNet's arguments put together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trainer.model.text import TextConditioning, TextEncoders


def time_ids(
    original_hw: tuple[int, int], crop_top_left: tuple[int, int], target_hw: tuple[int, int], batch_size: int = 1
) -> Tensor:
    """The size embedding's six numbers, the same for each sample of a batch.

    Order and meaning are those of the SDXL paper (Podell et al. 2023, section 2.2): the file's size before
    the resize, the crop's corner measured in the resized image, the size trained or drawn; all in pixels.

    Returns:
        [batch_size, 6] float32. Half precision would round sizes above 256 (bf16) or 2048 (fp16).
    """
    row = torch.tensor([*original_hw, *crop_top_left, *target_hw], dtype=torch.float32)
    return row.expand(batch_size, -1).contiguous()


def unet_inputs(noisy_latents: Tensor, timesteps: Tensor, text: TextConditioning, time_ids: Tensor) -> dict[str, Any]:
    """Keyword arguments of one call: `prediction = unet(**unet_inputs(...))[0]`, [B, 4, h, w].

    Args:
        noisy_latents: [B, 4, h, w], scaled; its dtype is the one that the text conditioning is given in.
        timesteps: [B] int64.
        text: hidden [B, positions, D] and pooled [B, P], in any float dtype.
        time_ids: [B, 6] float32; left as it is, so that sizes stay exact.
    """
    return {
        "sample": noisy_latents,
        "timestep": timesteps,
        "encoder_hidden_states": text.hidden.to(noisy_latents.dtype),
        "added_cond_kwargs": {"text_embeds": text.pooled.to(noisy_latents.dtype), "time_ids": time_ids},
        "return_dict": False,
    }


def condition_text(
    encoders: TextEncoders | None,
    device: torch.device,
    input_ids: Tensor | None,
    text_hidden: Tensor | None,
    text_pooled: Tensor | None,
) -> TextConditioning:
    """The text conditioning of a batch on `device`: from frozen encoders, or as it was cached.

    Args:
        encoders: needed where `input_ids` are given.
        input_ids: [B, 2, chunks, 77] int64, or None where the outputs were cached.
        text_hidden, text_pooled: [B, positions, D] and [B, P] in the dtype they were cached in, or None.
    """
    if text_hidden is not None and text_pooled is not None:
        hidden = text_hidden.to(device, torch.float32, non_blocking=True)
        return TextConditioning(hidden, text_pooled.to(device, torch.float32, non_blocking=True))
    if encoders is None or input_ids is None:
        raise ValueError("a batch without cached text outputs needs input_ids and text encoders")
    # The frozen encoders' own precision holds, whatever the training step's autocast says.
    with torch.no_grad(), torch.autocast(encoders.one.device.type, enabled=False):
        return encoders.encode(input_ids.to(device, non_blocking=True))

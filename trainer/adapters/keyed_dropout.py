"""Dropout between LoRA's two matrices, drawn from what an image is and where: nothing hangs on time, place or batch.

A generator's state would have to be saved, would differ with the number of workers, and would be another when a block
is recomputed. Here the mask is a hash of the noisy image, the layer's name and the element's place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from trainer.adapters.parameters import PEFT_NAME
from trainer.keyed import draw_seed

_STEPS = 24  # bits of a draw
# Odd constants of splitmix64 (Steele et al. 2014), as signed numbers: products wrap around.
_FIRST, _SECOND, _THIRD = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15, -0x61C8864680B583EB


class KeyedDropout:
    """Shared by all layers of a model: which images are passing through it."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._keys: Tensor | None = None

    def note(self, noisy_latents: Tensor, timesteps: Tensor) -> None:
        """The images of the pass that begins; what is recomputed in its backward pass finds them still.

        Args:
            noisy_latents: [B, c, h, w]; timesteps: [B].
        """
        bits = noisy_latents.detach().float().flatten(1).view(torch.int32).long()
        places = torch.arange(1, bits.shape[1] + 1, device=bits.device)
        self._keys = _mixed((_mixed(bits + _mixed(places))).sum(dim=1) + timesteps.double().mul(4096).long())

    def masked(self, values: Tensor, layer: int) -> Tensor:
        """The values [B x n, ...] with some left out, and the others larger in turn."""
        assert self._keys is not None, "no pass has begun"
        keys = self._keys.repeat_interleave(len(values) // len(self._keys))
        places = torch.arange(values[0].numel(), device=values.device).view(1, *values.shape[1:])
        draws = _mixed(_mixed(keys + layer).view(-1, *[1] * (values.ndim - 1)) + places * _THIRD)
        kept = (draws & (2**_STEPS - 1)) >= round(self.rate * 2**_STEPS)
        return values * (kept.to(values.dtype) / (1 - self.rate))


def add_dropout(model: nn.Module, rate: float) -> KeyedDropout:
    """Have every LoRA layer of a model leave out what its first matrix gives, while training."""
    dropout = KeyedDropout(rate)
    for name, module in model.named_modules():
        layer: Any = module
        if len(getattr(module, "lora_A", ())):
            key = draw_seed("dropout", name)
            layer.lora_A[PEFT_NAME].register_forward_hook(_hook(dropout, key))
    return dropout


def _hook(dropout: KeyedDropout, key: int) -> Any:
    def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor | None:
        return dropout.masked(output, key) if module.training else None

    return hook


def _mixed(numbers: Tensor) -> Tensor:
    """splitmix64's output function of int64 numbers, shifts being arithmetic."""
    numbers = (numbers ^ (numbers >> 30)) * _FIRST
    numbers = (numbers ^ (numbers >> 27)) * _SECOND
    return numbers ^ (numbers >> 31)

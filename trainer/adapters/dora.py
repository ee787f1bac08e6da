"""DoRA's forward pass with its norms in fp32 whatever the base is held in (Liu et al. 2024, equations 5 and 11).

PEFT's own takes them in the dtype of the activations: in bf16 the start would differ from the base model by 0.4 %.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor


@torch.no_grad()
def weight_norms(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Norms of the rows of `weight + scale * up @ down`, [out] float32 on the weight's device.

    Args:
        weight: [out, in] or [out, in, height, width]; `down`, `up`: LoRA's two matrices, in the form of the layer.
    """
    # Autocast would multiply in bf16; of a plan's tensors it knows nothing.
    plain = nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False)
    with plain:
        whole = up.flatten(1).float() @ down.flatten(1).float()
        whole = whole.mul_(scale).add_(weight.flatten(1))
        return torch.linalg.vector_norm(whole, dim=1).clamp_min_(torch.finfo(torch.float32).tiny)


class ExactDora(LoraVariant):
    """What PEFT calls in place of its own formula."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """The layer's output, of the base's (`result`)."""
        down, up, base = module.lora_A[active_adapter], module.lora_B[active_adapter], module.get_base_layer()
        scale, magnitude = module.scaling[active_adapter], module.lora_magnitude_vector[active_adapter].weight
        weight = base.weight  # once: of a base in fewer bits, it is unpacked each time
        norms = weight_norms(weight, down.weight, up.weight, scale)
        factor = magnitude.flatten() / norms
        shape = (1, -1, *[1] * (weight.ndim - 2))  # channels come second where there are rows and columns
        if weight.ndim == 2:
            shape = (-1,)
        del weight
        change = up(down(module.lora_dropout[active_adapter](x))) * scale
        plain = result if base.bias is None else result - base.bias.to(result.dtype).view(shape)
        more = (factor - 1).to(result.dtype).view(shape)
        return result + more * plain + factor.to(result.dtype).view(shape) * change

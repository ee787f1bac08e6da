"""Weights in 8 or 4 bits, each block of 64 with a scale of its own, by bitsandbytes' kernels.

`int8` has 255 equal steps between the negative and the positive of a block's largest weight. `nf4` has 16 steps that
lie where weights of a normal distribution do (Dettmers et al. 2023, QLoRA). Scales are fp32, so a weight takes 8.5 or
4.5 bits.
"""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainer.config.values import FrozenWeights
from trainer.errors import UserError, printable
from trainer.package_files import let_in

BLOCK = 64
"""Weights that share a scale."""
_KEY = "model.frozen_weights"
_LARGEST_ERROR = {"int8": 0.01, "nf4": 0.2}  # of a block's largest weight; half of the widest step is less


def require_library(held: FrozenWeights) -> None:
    """Refuse what bitsandbytes is needed for where it cannot be imported.

    Raises:
        UserError: with how to install it.
    """
    try:
        _kernels()
    except ImportError:
        mend = "which is not installed; `pip install 'sdxl-train[quantized]'`"
        raise UserError(f"{_KEY} = {held}: needs bitsandbytes, {mend}") from None
    except (OSError, RuntimeError, AttributeError) as error:
        raise UserError(f"{_KEY} = {held}: bitsandbytes cannot be used here: {_first_line(error)}") from None


def require_kernels(held: FrozenWeights, device: torch.device) -> None:
    """Refuse what the library cannot do on this device: some thousand weights go there and back.

    Raises:
        UserError: the library is not there, has no kernels for the device, or they are wrong.
    """
    if held == "compute":
        return
    require_library(held)
    weights = torch.linspace(-1, 1, 64 * BLOCK, device=device)
    try:
        error = float((unpacked(*packed(weights, held), held, weights.shape, torch.float32) - weights).abs().max())
    except (RuntimeError, NotImplementedError, OSError, AttributeError) as failure:
        said = f"bitsandbytes does not work on {device.type}: {_first_line(failure)}"
        raise UserError(f"{_KEY} = {held}: {said}; use `compute`") from None
    if not error <= _LARGEST_ERROR[held]:
        said = f"bitsandbytes gives wrong weights on {device.type}, by {error:.3g} of 1"
        raise UserError(f"{_KEY} = {held}: {said}; use `compute`")


def packed_sizes(shape: tuple[int, ...], held: FrozenWeights) -> tuple[int, int]:
    """Bytes of the steps and number of the scales of a weight of this shape, which is a whole number of blocks."""
    numel = math.prod(shape)
    return numel // (2 if held == "nf4" else 1), numel // BLOCK


def packed(weight: Tensor, held: FrozenWeights) -> tuple[Tensor, Tensor]:
    """Steps [bytes] uint8 and scales [blocks] float32 of a float weight, on its device."""
    flat = weight.reshape(-1)
    if held == "nf4":
        steps, scales = _kernels().quantize_4bit(flat, BLOCK, "nf4", torch.uint8)
    else:
        steps, scales = _kernels().quantize_blockwise(flat, _levels(flat.device), BLOCK)
    return steps.view(-1), scales


def unpacked(
    steps: Tensor, scales: Tensor, held: FrozenWeights, shape: tuple[int, ...] | torch.Size, dtype: torch.dtype
) -> Tensor:
    """The weight of these steps and scales, in `shape` and `dtype`; each is computed in fp32 and rounded once."""
    if held == "nf4":
        weight = _kernels().dequantize_4bit(steps, scales, BLOCK, "nf4", (math.prod(shape),), dtype)
    else:
        weight = _kernels().dequantize_blockwise(steps, scales, _levels(steps.device), BLOCK, dtype)
    return weight.view(shape)


@cache
def _kernels() -> Any:
    # On a CPU with bf16 it warns of a faster product that it did not find, and that is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    let_in("bitsandbytes")
    import bitsandbytes  # noqa: F401  # pyright: ignore[reportUnusedImport]

    return torch.ops.bitsandbytes


@cache
def _levels(device: torch.device) -> Tensor:
    """The 255 steps of `int8`, and the first again, for the kernels look up 256; [256] float32, ascending."""
    with torch.inference_mode(False):
        levels = torch.arange(-127, 128, dtype=torch.float32) / 127
        return torch.cat([levels[:1], levels]).to(device)


def _first_line(error: BaseException) -> str:
    return printable((str(error).strip() or type(error).__name__).splitlines()[0])

"""Convolutions that compute in the memory layout NHWC (PyTorch's channels_last)."""

from typing import Any

import torch
from torch import nn


def prefer_channels_last(model: nn.Module) -> None:
    """Give every convolution with a window its input in NHWC; its output comes so as well.

    Weights stay as they are, so shards, optimizer state and checkpoints do not change: the kernel takes a copy of them
    in its layout. Convolutions of 1 x 1 are matrix products in either layout.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
            module.register_forward_pre_hook(_to_channels_last)


def _to_channels_last(module: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return arguments[0].contiguous(memory_format=torch.channels_last), *arguments[1:]

"""Linear layers and convolutions that do not train and hold their weights in 8 or 4 bits.

A layer unpacks its weight in each forward pass, and again in each backward pass: what it keeps for that is nothing but
itself. There are gradients for its input alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from trainer.config.values import FrozenWeights
from trainer.model.frozen.packed_weights import BLOCK, packed, packed_sizes, require_library, unpacked

_FEW_CHANNELS = 16  # those that read and write latents: next to nothing of the model, and all of the picture


class PackedLayer(nn.Module):
    """What a layer becomes whose weight is packed; `bias` stays as it is.

    Attributes:
        held: in how many bits.
        weight_shape, weight_dtype: of the unpacked weight: what the layer computes with.
        steps, scales: as `packed` gives them; no checkpoint holds them.
    """

    held: FrozenWeights
    weight_shape: tuple[int, ...]
    weight_dtype: torch.dtype
    bias: nn.Parameter | None
    steps: Tensor
    scales: Tensor

    def pack(self, held: FrozenWeights) -> None:
        """Give up the weight, for room for a packed one on its device."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.held, self.weight_shape, self.weight_dtype = held, tuple(weight.shape), weight.dtype
        num_bytes, num_scales = packed_sizes(self.weight_shape, held)
        steps = torch.empty(num_bytes, dtype=torch.uint8, device=weight.device)
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("scales", torch.empty(num_scales, device=weight.device), persistent=False)

    @torch.no_grad()
    def fill(self, weight: Tensor) -> None:
        """Take this weight, of any float dtype and on any device; it is packed on the layer's own."""
        steps, scales = packed(weight.to(self.steps.device, torch.float32), self.held)
        self.steps.copy_(steps)
        self.scales.copy_(scales)

    @property
    def weight(self) -> Tensor:
        """The weight, unpacked anew each time."""
        return unpacked(self.steps, self.scales, self.held, self.weight_shape, self.weight_dtype)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output, in the dtype of its weight."""
        return _WithFrozenWeight.apply(input.to(self.weight_dtype), self)  # pyright: ignore[reportReturnType]

    def output(self, input: Tensor, weight: Tensor) -> Tensor:
        """What the layer does, without gradients."""
        raise NotImplementedError

    def input_gradient(self, shape: torch.Size, weight: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of an input of this shape, by that of the output."""
        raise NotImplementedError


class PackedLinear(PackedLayer, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """A linear layer with packed weights."""

    def output(self, input: Tensor, weight: Tensor) -> Tensor:
        """See `PackedLayer`."""
        return F.linear(input, weight, self.bias)

    def input_gradient(self, shape: torch.Size, weight: Tensor, gradient: Tensor) -> Tensor:
        """See `PackedLayer`."""
        return torch.matmul(gradient, weight)


class PackedConv2d(PackedLayer, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    """A convolution with packed weights."""

    def output(self, input: Tensor, weight: Tensor) -> Tensor:
        """See `PackedLayer`."""
        return F.conv2d(input, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)

    def input_gradient(self, shape: torch.Size, weight: Tensor, gradient: Tensor) -> Tensor:
        """See `PackedLayer`."""
        # The transposed convolution, and not PyTorch's own gradient: that would make an input only for its shape.
        beyond: list[int] = []
        for axis, length in enumerate(shape[2:]):
            reach = self.dilation[axis] * (self.kernel_size[axis] - 1) + 1 - 2 * int(self.padding[axis])
            beyond.append(length - (gradient.shape[2 + axis] - 1) * self.stride[axis] - reach)
        rest: Any = (self.stride, self.padding, tuple(beyond), self.groups, self.dilation)
        return F.conv_transpose2d(gradient, weight, None, *rest)


class _WithFrozenWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: PackedLayer) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layer, ctx.shape = layer, input.shape
        return layer.output(input, layer.weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.layer.input_gradient(ctx.shape, ctx.layer.weight, gradient), None


def pack_frozen(model: nn.Module, held: FrozenWeights) -> None:
    """Have the linear layers and convolutions of a model that do not train hold their weights packed; in place.

    Those that read or write latents stay as they are, as do weights that are no whole number of blocks.

    Args:
        model: laid out on the meta device, its weights in the dtype that they are to compute in.
        held: `compute` changes nothing.
    Raises:
        UserError: the library that packs is not there.
    """
    if held == "compute":
        return
    require_library(held)
    for module in model.modules():
        packs = _PACKED.get(type(module))
        if packs is not None and _can_be_packed(module):
            module.__class__ = packs
            assert isinstance(module, PackedLayer)
            module.pack(held)


_PACKED: dict[type[nn.Module], type[PackedLayer]] = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d}


def _can_be_packed(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        is_plain = module.padding_mode == "zeros" and not isinstance(module.padding, str)
        if not is_plain or min(module.in_channels, module.out_channels) < _FEW_CHANNELS:
            return False
    weight = module.weight
    assert isinstance(weight, Tensor)
    return not weight.requires_grad and weight.is_floating_point() and math.prod(weight.shape) % BLOCK == 0


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    """The layers with packed weights, by the name that the weight had as a parameter."""
    return {f"{name}.weight": layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}


def packed_bytes(model: nn.Module) -> int:
    """What all packed weights take."""
    return sum(layer.steps.nbytes + layer.scales.nbytes for layer in packed_layers(model).values())


def stands_for(layer: PackedLayer) -> Tensor:
    """A tensor without memory that has the shape of the layer's weight."""
    return torch.empty(layer.weight_shape, device="meta")

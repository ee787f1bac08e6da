"""Layers with packed weights: against bitsandbytes itself, plain torch, and the size that a plan counts."""

import subprocess
import sys
from typing import get_args

import bitsandbytes.functional
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config.values import FrozenWeights
from trainer.model.frozen.packed_layers import PackedConv2d, PackedLinear, pack_frozen, packed_bytes, packed_layers
from trainer.model.frozen.packed_weights import BLOCK, packed, require_kernels, unpacked

HELD: tuple[FrozenWeights, ...] = tuple(each for each in get_args(FrozenWeights) if each != "compute")
# Relative error of normal weights: of `nf4` what bitsandbytes gives, of `int8` less than its own 8-bit type has.
ERRORS = {"nf4": 0.095, "int8": 0.0062}


def weights(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)


def net(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """On the meta device, frozen: a convolution of latents, one with a window, one that strides, and linear layers."""
    with torch.device("meta"):
        layers = (
            nn.Conv2d(4, 32, 3, padding=1),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.Conv2d(64, 64, 3, stride=2, padding=1, bias=False),
            nn.Conv2d(64, 64, 1),
            nn.Linear(8, 96),
            nn.Linear(96, 5, bias=False),
        )
    return nn.Sequential(*layers).requires_grad_(False).to(dtype)


def filled(held: FrozenWeights, dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, nn.Sequential]:
    """The same network packed, and plain with the weights that the packed one unpacks."""
    packed_net, plain = net(dtype), net(dtype)
    pack_frozen(packed_net, held)
    for each in (packed_net, plain):
        each.to_empty(device="cpu")
    layers = packed_layers(packed_net)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(weights(*parameter.shape))
            if name in layers:
                layers[name].fill(weights(*parameter.shape))
                parameter.copy_(layers[name].weight)
            else:
                packed_net.get_parameter(name).copy_(parameter)
    return packed_net, plain


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_error_is_the_librarys_own(held: FrozenWeights, dtype: torch.dtype) -> None:
    values = weights(96, 320)
    ours = unpacked(*packed(values, held), held, values.shape, dtype)
    assert ours.shape == values.shape and ours.dtype == dtype
    if held == "nf4":
        steps, state = bitsandbytes.functional.quantize_4bit(values, blocksize=BLOCK, quant_type="nf4")
        theirs = bitsandbytes.functional.dequantize_4bit(steps, state).to(dtype)
        assert torch.equal(ours, theirs)
    else:  # equal steps: half of one, a little more where the kernel looks values up, and what `dtype` rounds
        blocks, rounding = values.view(-1, BLOCK), torch.finfo(dtype).eps
        errors = (ours.float().view(-1, BLOCK) - blocks).abs() / blocks.abs().amax(1, keepdim=True)
        assert float(errors.max()) < 0.502 / 127 + rounding / 2
        steps, state = bitsandbytes.functional.quantize_blockwise(values, blocksize=BLOCK)
        theirs = bitsandbytes.functional.dequantize_blockwise(steps, state)
        assert (ours - values).norm() < (theirs - values).norm()
    assert float((ours.float() - values).norm() / values.norm()) < ERRORS[held]


@pytest.mark.parametrize("held", HELD)
def test_zeros_and_single_large_weights_stay(held: FrozenWeights) -> None:
    values = torch.zeros(3, BLOCK)
    values[1, 5], values[2, 7] = 3.0, -0.25
    assert torch.equal(unpacked(*packed(values, held), held, values.shape, torch.float32), values)


@pytest.mark.parametrize("held", HELD)
def test_outputs_and_gradients_are_those_of_the_unpacked_weights(held: FrozenWeights) -> None:
    ours, plain = filled(held)
    assert [type(layer) for layer in ours] == [
        nn.Conv2d,  # it reads latents
        PackedConv2d,
        PackedConv2d,
        PackedConv2d,
        PackedLinear,
        nn.Linear,  # 480 weights are no whole number of blocks
    ]
    found = []
    for each in (ours, plain):
        x = weights(2, 4, 16, 16).mul_(50).requires_grad_()
        out = each(x)
        out.square().sum().backward()
        assert x.grad is not None and all(parameter.grad is None for parameter in each.parameters())
        found.append((out.detach(), x.grad))
    for a, b in zip(*found, strict=True):
        assert a.dtype == torch.float32 and float((a - b).abs().max() / b.abs().max()) < 1e-6


@pytest.mark.parametrize("held", HELD)
def test_a_pass_keeps_nothing_but_its_inputs_graph(held: FrozenWeights) -> None:
    """Nothing is saved for the backward pass, neither the unpacked weight nor the input; autocast changes nothing."""
    ours, plain = filled(held, torch.bfloat16)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = weights(2, 4, 8).requires_grad_()
    watch = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with watch, torch.autocast("cpu", torch.bfloat16):
        out = ours[4](x)
    assert not saved and out.dtype == torch.bfloat16
    assert torch.equal(out, F.linear(x.bfloat16(), plain[4].weight, plain[4].bias))  # type: ignore[arg-type]
    with torch.inference_mode():
        assert torch.equal(ours[4](x), out)


@pytest.mark.parametrize(("held", "bits"), [("int8", 8.5), ("nf4", 4.5)])
def test_bytes_and_names(held: FrozenWeights, bits: float) -> None:
    laid_out, (ours, plain) = net(), filled(held)
    pack_frozen(laid_out, held)
    numel = sum(plain.get_parameter(name).numel() for name in packed_layers(ours))
    assert packed_bytes(laid_out) == packed_bytes(ours) == numel * bits / 8
    assert all(buffer.is_meta for buffer in laid_out.buffers())
    assert ours.state_dict().keys() | packed_layers(ours).keys() == plain.state_dict().keys()
    assert not ours.state_dict().keys() & packed_layers(ours).keys()


def test_what_trains_is_not_packed() -> None:
    layer = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64).requires_grad_(False))
    pack_frozen(layer, "int8")
    assert [type(each) for each in layer] == [nn.Linear, PackedLinear]


def test_this_machine_can() -> None:
    for held in get_args(FrozenWeights):
        require_kernels(held, torch.device("cpu"))


def test_without_the_library_it_says_how_to_get_it() -> None:
    """In a process where it cannot be imported."""
    code = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "import torch\nfrom trainer.errors import UserError\n"
        "from trainer.model.frozen.packed_weights import require_kernels\n"
        "require_kernels('compute', torch.device('cpu'))\n"
        "try: require_kernels('nf4', torch.device('cpu'))\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said = (
        "model.frozen_weights = nf4: needs bitsandbytes, which is not installed; `pip install 'sdxl-train[quantized]'`"
    )
    assert done.stdout.strip() == said

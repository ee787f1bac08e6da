"""What an adapter's layer makes of the base's weight: the formulas of each kind, in fp32."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.adapters.dora import weight_norms


class DoesNotFit(Exception):
    """A layer's tensors are not of the shape of the weight."""


@torch.no_grad()
def changed_weight(
    kind: str, tensors: Mapping[str, Tensor], scale: float, weight: Tensor, strength: float = 1.0
) -> Tensor:
    """The weight with the change in it, `strength` times; float32 of the weight's shape.

    Args:
        kind: as `AdapterLayer.kind`.
        tensors: fp32, by kohya's names.
        scale: how many times the change counts.
        weight: the base's, any float dtype.
    Raises:
        DoesNotFit: their shapes differ.
    """
    base = weight.float()
    if kind == "oft":
        whole = _turned(tensors["oft_R.weight"], base)
    elif kind == "dora":
        whole = _with_magnitudes(tensors, scale, base)
    else:
        return base + strength * change_of(kind, tensors, scale, base.shape)
    return base + strength * (whole - base)


@torch.no_grad()
def change_of(kind: str, tensors: Mapping[str, Tensor], scale: float, shape: torch.Size) -> Tensor:
    """What is added to a weight of this shape, float32; of the kinds that add.

    Raises:
        DoesNotFit: it has another number of elements.
    """
    if _elements(kind, tensors) != shape.numel():  # before anything of that size is made
        raise DoesNotFit
    if kind in ("lora", "dora"):
        change = tensors["lora_up.weight"].flatten(1) @ tensors["lora_down.weight"].flatten(1) * scale
    elif kind == "loha":
        first, second = (tensors[f"hada_w{n}_a"] @ tensors[f"hada_w{n}_b"] for n in (1, 2))
        change = first * second * scale
    else:
        assert kind == "lokr", kind
        change = _kronecker(tensors, scale)
    if change.shape[0] != shape[0]:
        raise DoesNotFit
    return change.reshape(shape)


def _elements(kind: str, tensors: Mapping[str, Tensor]) -> int:
    """Of the change; 0 where the tensors have no such form."""
    if kind in ("lora", "dora"):
        return len(tensors["lora_up.weight"]) * tensors["lora_down.weight"][0].numel()
    if kind == "loha":
        sides = {(len(tensors[f"hada_w{n}_a"]), tensors[f"hada_w{n}_b"].shape[1]) for n in (1, 2)}
        are_matrices = all(tensors[f"hada_w{n}_{half}"].ndim == 2 for n in (1, 2) for half in "ab")
        return math.prod(sides.pop()) if len(sides) == 1 and are_matrices else 0
    if tensors["lokr_w1"].ndim != 2:
        return 0
    if "lokr_w2" in tensors:
        return tensors["lokr_w1"].numel() * tensors["lokr_w2"].numel() if tensors["lokr_w2"].ndim in (2, 4) else 0
    a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
    return tensors["lokr_w1"].numel() * len(a) * b.shape[1] if a.ndim == b.ndim == 2 else 0


def _kronecker(tensors: Mapping[str, Tensor], scale: float) -> Tensor:
    first = tensors["lokr_w1"]
    second = tensors["lokr_w2"] if "lokr_w2" in tensors else tensors["lokr_w2_a"] @ tensors["lokr_w2_b"]
    if second.ndim == 4:
        first = first[:, :, None, None]
    return torch.kron(first, second.contiguous()) * scale


def _with_magnitudes(tensors: Mapping[str, Tensor], scale: float, base: Tensor) -> Tensor:
    magnitudes = tensors["dora_scale"].flatten()
    if len(magnitudes) != base.shape[0]:
        raise DoesNotFit  # those of inputs, as LyCORIS has them by default, among them
    whole = base + change_of("lora", tensors, scale, base.shape)
    norms = weight_norms(base, tensors["lora_down.weight"], tensors["lora_up.weight"], scale)
    return whole * (magnitudes / norms).view(-1, *[1] * (base.ndim - 1))


def _turned(skew: Tensor, base: Tensor) -> Tensor:
    """The weight whose inputs are turned block by block, by Cayley's formula (Qiu et al. 2023)."""
    side = round((1 + (1 + 8 * skew.shape[1]) ** 0.5) / 2)
    if base.ndim != 2 or side * (side - 1) // 2 != skew.shape[1] or skew.shape[0] * side != base.shape[1]:
        raise DoesNotFit
    rows, columns = torch.triu_indices(side, side, 1)
    matrix = skew.new_zeros(len(skew), side, side)
    matrix[:, rows, columns] = skew
    matrix = matrix - matrix.mT
    one = torch.eye(side)
    turn = torch.linalg.solve(one + matrix, one - matrix, left=False)
    # The layer takes x R in place of x, so that its weight becomes W R^T.
    return torch.einsum("orc,rkc->ork", base.unflatten(1, (len(skew), side)), turn).flatten(1)

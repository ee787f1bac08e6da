"""Gradients as products of two thin matrices, which are averaged in their place.

PowerSGD (Vogels et al. 2019, arXiv 1905.13727, algorithms 1 and 2): of a gradient M with what was left out before,
P = M Q is averaged and made orthonormal, then Q = M' P is averaged; all get P Q', and Q is where the next step starts
from. Each worker keeps M - P Q' with the Q of its own, as in the paper. PyTorch's `powerSGD_hook` subtracts the mean
product in its place, so that each worker's difference from the mean adds up over the steps, to no effect but that of
bf16 running out of digits; and it makes P orthonormal in bf16 where the weights are bf16. Here all of it is fp32.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.keyed import draw_seed

_TINY = 1e-15  # of a norm, whose squares still are numbers of fp32


def starting_basis(shape: Sequence[int], rank: int, seed: int, name: str) -> Tensor:
    """The first Q of a tensor, fp32 [columns, rank] on the CPU: the same on all workers."""
    columns = torch.Size(shape[1:]).numel()
    generator = torch.Generator().manual_seed(draw_seed("basis", seed, name))
    return torch.randn(columns, rank, generator=generator)


def orthonormal(matrix: Tensor) -> Tensor:
    """The columns of fp32 [n, rank] made so, one after the other (modified Gram-Schmidt); nothing becomes zeros."""
    columns: list[Tensor] = []
    for column in matrix.unbind(1):
        for before in columns:
            column = column - before * torch.dot(before, column)
        norm = torch.linalg.vector_norm(column)
        columns.append(column * torch.where(norm < _TINY, 0.0, 1 / norm))
    return torch.stack(columns, dim=1)


def next_basis(right: Tensor, before: Tensor) -> Tensor:
    """The Q to start from in the next step: a column of nothing, as of a gradient of zeros, would stay so for ever."""
    return torch.where(torch.linalg.vector_norm(right, dim=0) < _TINY, before, right)


class ThinMatrices:
    """The products of one bucket, between its two exchanges."""

    def __init__(self, matrices: Mapping[str, Tensor], errors: Mapping[str, Tensor], scale: float) -> None:
        """
        Args:
            matrices: gradients [rows, columns], by name.
            errors: what was left out of each before, of as many elements.
            scale: the gradients are to be multiplied by it.
        """
        self._matrices, self._errors, self._scale = matrices, errors, scale
        self._left: dict[str, Tensor] = {}

    def left(self, bases: Mapping[str, Tensor]) -> list[Tensor]:
        """P of each, still this worker's own."""
        return [self._whole(name) @ orthonormal(bases[name]) for name in self._matrices]

    def right(self, summed: Sequence[Tensor]) -> list[Tensor]:
        """Q of each, this worker's own, from the P that all workers have in common."""
        self._left = {name: orthonormal(left) for name, left in zip(self._matrices, summed, strict=True)}
        return [self._whole(name).T @ left for name, left in self._left.items()]

    def error(self, name: str, own_right: Tensor) -> Tensor:
        """What this worker's product leaves out of a gradient, fp32 [rows, columns]."""
        return self._whole(name).addmm_(self._left[name], own_right.T, alpha=-1)

    def product(self, name: str, right: Tensor) -> Tensor:
        """What all workers get of a gradient, fp32 [rows, columns]."""
        return self._left[name] @ right.T

    def _whole(self, name: str) -> Tensor:
        """A gradient with what was left out of it before, in memory of its own."""
        whole = self._matrices[name].to(torch.float32, copy=True)
        if self._scale != 1.0:
            whole *= self._scale
        whole += self._errors[name].view(whole.shape)
        return whole


def summed_together(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of fp32 tensors over all workers, in one exchange."""
    if not tensors:
        return []
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

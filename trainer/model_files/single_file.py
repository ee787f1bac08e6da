"""Tensors of a single file to those of a component's module, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.model_files.key_map import LOGIT_SCALE_VALUE, KeyEntry


def from_file(entry: KeyEntry, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """The module's tensors in one tensor of a single file: (name, view), in the order of `entry.names`.

    Raises:
        ValueError: the tensor cannot have the entry's form.
    """
    if entry.form == "same":
        return [(entry.names[0], tensor)]
    if entry.form == "transposed":
        if tensor.ndim != 2:
            raise ValueError(f"{entry.file_name} has shape {list(tensor.shape)}; wanted a matrix")
        return [(entry.names[0], tensor.T)]
    if entry.form == "conv1x1":
        # Some tools write the linear form.
        return [(entry.names[0], tensor.reshape(tensor.shape[:2]) if _is_conv1x1(tensor) else tensor)]
    if not tensor.ndim or tensor.shape[0] % len(entry.names):
        raise ValueError(f"{entry.file_name} has shape {list(tensor.shape)}; wanted {len(entry.names)} equal parts")
    return list(zip(entry.names, tensor.chunk(len(entry.names)), strict=True))


def to_file(entry: KeyEntry, tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of a single file, made of the module's tensors `entry.names`; contiguous, maybe a view."""
    if entry.form == "stacked":
        return torch.cat(list(tensors))
    (tensor,) = tensors
    if entry.form == "transposed":
        tensor = tensor.T
    elif entry.form == "conv1x1":
        tensor = tensor[:, :, None, None]
    return tensor.contiguous()


def position_ids(positions: int = 77) -> Tensor:
    """The constant that published files hold for the first text encoder: [1, positions] int64."""
    return torch.arange(positions, dtype=torch.int64)[None]


def logit_scale(dtype: torch.dtype) -> Tensor:
    """The constant that published files hold for the second text encoder: a scalar."""
    return torch.tensor(LOGIT_SCALE_VALUE, dtype=dtype)


def _is_conv1x1(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.shape[2:] == (1, 1)

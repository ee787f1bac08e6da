"""Weights in groups of bounded size, and the buffers that hold one: for what needs a copy of them in fp32."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.optim.ema_memory import chunk_elements


class Piece(NamedTuple):
    """Some rows of a parameter."""

    name: str
    start: int
    stop: int
    elements: int

    def of(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor."""
        return tensor[self.start : self.stop] if tensor.ndim else tensor


def batches(weights: Mapping[str, Tensor], most: int) -> Iterator[list[Piece]]:
    """Pieces of all weights in groups of at most `most` elements, but at least a row."""
    group, filled = list[Piece](), 0
    for name, weight in weights.items():
        rows = weight.shape[0] if weight.ndim else 1
        width = weight.numel() // max(rows, 1)
        start = 0
        while start < rows:
            if group and filled + width > most:
                yield group
                group, filled = [], 0
            stop = min(rows, start + max((most - filled) // max(width, 1), 1))
            group.append(Piece(name, start, stop, (stop - start) * width))
            filled, start = filled + group[-1].elements, stop
    if group:
        yield group


def scratch_buffers(weights: Mapping[str, Tensor], number: int) -> list[Tensor]:
    """Buffers that hold any of the groups of `batches`."""
    device = device_of(weights)
    groups = batches(weights, chunk_elements(device.type))
    most = max((sum(piece.elements for piece in group) for group in groups), default=0)
    return [torch.empty(most, dtype=torch.float32, device=device) for _ in range(number)]


def views(buffer: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Parts of a buffer in the shapes of `like`, one after the other."""
    parts = buffer[: sum(each.numel() for each in like)].split([each.numel() for each in like])
    return [part.view(each.shape) for part, each in zip(parts, like, strict=True)]


@torch.no_grad()
def copy_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first, in the order of the device's stream."""
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def device_of(weights: Mapping[str, Tensor]) -> torch.device:
    """Of all of them."""
    return next(iter(weights.values())).device

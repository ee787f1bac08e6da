"""Where running averages lie, and how many bytes that takes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}
_SEGMENT_ELEMENTS = 1 << 26  # of pinned memory, which PyTorch allocates in powers of two
_ALIGNMENT = 16  # elements
_FP32_BYTES = 4


@dataclass(frozen=True)
class EmaMemory:
    """Bytes of one worker, its largest.

    Attributes:
        device: all through the run.
        host: all through the run, pinned where the device is a CUDA one.
        update: on the device, while averages are updated.
        swap: on the device, while an average is in the model.
    """

    device: int
    host: int
    update: int
    swap: int


def memory_of_averages(
    shapes: Sequence[Sequence[int]], *, averages: int, shards: int, place: str, weights: torch.dtype, device: str
) -> EmaMemory:
    """What averages of parameters of these (whole) shapes take.

    Args:
        averages: how many.
        shards: workers that share the weights; 1 where each has all of them.
        place: "device" or "host".
        weights: dtype of the weights as the optimizer sees them.
        device: "cuda" or "cpu".
    """
    mine = [_rows_of_one((*shape,), shards) for shape in shapes]
    counts = [math.prod(shape) for shape in mine]
    chunk = min(chunk_elements(device), sum(counts))
    chunk = max([chunk, *(math.prod(shape[1:]) for shape in mine if math.prod(shape))])
    on_host = 0
    if place == "host":
        on_host = sum(_segments(counts)[1]) if device == "cuda" else sum(counts)
    scratch = chunk * _FP32_BYTES
    return EmaMemory(
        device=0 if place == "host" else averages * sum(counts) * _FP32_BYTES,
        host=averages * on_host * _FP32_BYTES,
        update=2 * scratch if kept_in_chunks(place, weights) else 0,
        swap=scratch + (0 if weights == torch.float32 else sum(counts) * weights.itemsize),
    )


def _rows_of_one(shape: tuple[int, ...], shards: int) -> tuple[int, ...]:
    return (-(-shape[0] // shards), *shape[1:]) if shape else shape


def kept_in_chunks(place: str, weights: torch.dtype) -> bool:
    """Whether an update needs scratch: averages come from the host, or weights are not fp32."""
    return place == "host" or weights != torch.float32


def chunk_elements(device: str) -> int:
    """Elements that are updated or swapped at a time; results do not depend on it."""
    return _CHUNK_ELEMENTS[device]


def host_tensors(shapes: Mapping[str, torch.Size], device: torch.device) -> dict[str, Tensor]:
    """fp32 tensors in the host's memory, without values; pinned where `device` is a CUDA one.

    Pinned memory comes in powers of two. One by one, SDXL's weights would take a quarter more than they need.
    """
    if device.type != "cuda":
        return {name: torch.empty(shape, dtype=torch.float32) for name, shape in shapes.items()}
    places, sizes = _segments([shape.numel() for shape in shapes.values()])
    segments = [torch.empty(size, dtype=torch.float32, pin_memory=True) for size in sizes]
    return {
        name: segments[segment][begin : begin + shape.numel()].view(shape)
        for (name, shape), (segment, begin) in zip(shapes.items(), places, strict=True)
    }


def _segments(counts: Sequence[int]) -> tuple[list[tuple[int, int]], list[int]]:
    """The place of each tensor as (segment, first element), and the segments' sizes: powers of two."""
    places: list[tuple[int, int]] = []
    filled: list[int] = []
    for count in counts:
        room = -(-count // _ALIGNMENT) * _ALIGNMENT
        if not filled or filled[-1] + room > _SEGMENT_ELEMENTS:
            filled.append(0)
        places.append((len(filled) - 1, filled[-1]))
        filled[-1] += room
    return places, [1 << max(size - 1, 0).bit_length() for size in filled]

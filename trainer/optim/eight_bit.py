"""Moments in 8 bits: blocks of at most 256 numbers, each scaled by its largest (Dettmers et al. 2022).

"8-bit Optimizers via Block-wise Quantization" and its library cut a tensor into blocks of 256 wherever they fall. Here
a block never crosses a row (index of dimension 0), so that a tensor that is sharded by rows has the same blocks as a
whole one, and its state can go on at any number of workers, to the bit.
"""

from collections.abc import Sequence
from functools import cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

MAX_BLOCK = 256
MIN_BLOCK = 32  # below, a scale of 4 bytes per block costs more than it saves
MIN_ELEMENTS = 4096  # smaller tensors keep fp32 moments, as in the paper


def block_size(shape: Sequence[int]) -> int:
    """Elements per block: the largest divisor of a row that is at most `MAX_BLOCK`; 1 for vectors."""
    row = prod(shape[1:])
    return next(size for size in range(min(row, MAX_BLOCK), 0, -1) if row % size == 0) if row else 1


def blocks_per_row(shape: Sequence[int]) -> int:
    """Blocks that one index of dimension 0 holds."""
    return prod(shape[1:]) // block_size(shape)


def takes_8_bits(shape: Sequence[int]) -> bool:
    """Whether moments of a parameter of this (global) shape are kept in 8 bits: matrices, not biases and norms."""
    return prod(shape) >= MIN_ELEMENTS and block_size(shape) >= MIN_BLOCK


@cache
def dynamic_map(signed: bool) -> Tensor:
    """The 256 values of the paper's dynamic data type in rising order, fp32, within [-1, 1].

    Decade 10^-k, k = 0..6, is cut into 2^(6-k) equal bins (twice as many unsigned) whose middles are the values;
    further 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        middles = (10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += middles + [-value for value in middles] if signed else middles
    return torch.tensor(sorted(values + [0.0] * (256 - len(values))))


class CodeTables(NamedTuple):
    """What turns numbers into codes and back, on one device.

    Attributes:
        values: the map, fp32 [256].
        cells: of the numbers whose upper 16 bits are the index, int32 [65536]: the code of the smallest, and below it,
            in 16 bits, how far the last number of that code is from the end of the cell. No cell holds more than one
            bound between codes, so that adding a number's place in its cell carries into the code where it lies beyond.
        signed: whether the map is.
    """

    values: Tensor
    cells: Tensor
    signed: bool


@cache
def code_tables(signed: bool, device: torch.device) -> CodeTables:
    """The tables of the signed map (first moment) or the unsigned one (second moment)."""
    values = dynamic_map(signed)
    bounds = (values[:-1] + values[1:]) / 2
    upper_bits = torch.arange(1 << 16, dtype=torch.int32)
    # Negative numbers fall as their bits rise: the smallest of their cell has all lower bits set.
    smallest = torch.where(upper_bits < 1 << 15, upper_bits << 16, (upper_bits << 16) | 0xFFFF).view(torch.float32)
    cells = torch.bucketize(smallest, bounds, out_int32=True) << 16
    bits = bounds.view(torch.int32)
    cells[_cell(bits)] += 0xFFFF - _place(bits)
    return CodeTables(values.to(device), cells.to(device), signed)


def _cell(bits: Tensor) -> Tensor:
    """The upper 16 bits of fp32 numbers' bits."""
    return (bits >> 16).bitwise_and_(0xFFFF)


def _place(bits: Tensor, signed: bool = True) -> Tensor:
    """Where numbers lie within their cells, from 0, the smallest, to 65535."""
    return ((bits >> 31).bitwise_xor_(bits) if signed else bits) & 0xFFFF


def dequantize(codes: Tensor, scales: Tensor, tables: CodeTables) -> Tensor:
    """fp32 [n, block] from codes uint8 [n, block] and scales fp32 [n, 1]."""
    return tables.values.index_select(0, codes.to(torch.int32).view(-1)).view(codes.shape).mul_(scales)


def quantize(moments: Tensor, codes: Tensor, scales: Tensor, tables: CodeTables) -> None:
    """Write the nearest codes and the blocks' scales of `moments` (fp32 [n, block]); nan stays in its block's scale."""
    scales.copy_((moments.abs() if tables.signed else moments).amax(dim=1, keepdim=True))
    scaled = (moments * scales.clamp(min=torch.finfo(torch.float32).tiny).reciprocal_()).view(-1)
    bits = scaled.view(torch.int32)
    found = tables.cells.index_select(0, _cell(bits)).add_(_place(bits, tables.signed))
    codes.copy_((found >> 16).view(codes.shape))

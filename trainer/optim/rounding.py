"""How an fp32 result becomes a bf16 weight without losing small updates: stochastic rounding, Kahan summation.

bf16 keeps 8 bits of a weight. AdamW's update at a learning rate of 1.5e-6 is far below half of the last bit, so that
rounding to the nearest would drop nearly all of it (2 % arrives). Hence no such rounding exists here.
"""

import torch
from torch import Tensor

_LOW_16 = 0xFFFF


def rounding_key(draw: int) -> tuple[int, int]:
    """A 63-bit draw as two numbers of 32 bits with sign."""
    return _signed_32(draw), _signed_32(draw >> 31)


def random_bits(first: int, rows: int, width: int, key: Tensor, device: torch.device) -> Tensor:
    """32 random bits per counter as int32 [rows, width]; the counters are `first`, `first` + 1 and so on.

    `key` is int32 [2], a tensor, so that compiled code is the same for every key (`rounding_key`). A pure function of
    (key, counter), equal on every device: lowbias32 (C. Wellons, "Prospecting for hash functions",
    2018), keyed before and between its multiplications. Shifts of int32 keep the sign, hence the masks.
    """
    counters = torch.arange(first, first + rows * width, dtype=torch.int32, device=device).view(rows, width)
    return scrambled(counters, key)


def scrambled(bits: Tensor, key: Tensor | tuple[int, int]) -> Tensor:
    """Random bits of counters, int32 of any shape, in their place; `random_bits` has the rest."""
    bits ^= key[0]
    bits ^= (bits >> 16).bitwise_and_(_LOW_16)
    bits *= 0x7FEB352D
    bits += key[1]
    bits ^= (bits >> 15).bitwise_and_(0x1FFFF)
    bits *= _signed_32(0x846CA68B)
    bits ^= (bits >> 16).bitwise_and_(_LOW_16)
    return bits


def round_stochastically(exact: Tensor, first_block: int, key: Tensor) -> Tensor:
    """bf16 neighbours of `exact` (fp32 [n, block], overwritten), drawn so that the expectation is `exact`.

    Adds 16 random bits below bf16's last one and cuts them off. One hash serves two elements: its low half the left
    half of a block, its high half the right one.

    Args:
        first_block: number of the first block within its tensor, so that a part of it draws what the whole draws.
    """
    rows, block = exact.shape
    width = (block + 1) // 2
    return cut_at_random(exact, random_bits(first_block * width, rows, width, key, exact.device))


def cut_at_random(exact: Tensor, bits: Tensor) -> Tensor:
    """`exact` (fp32 [n, block], overwritten) cut to bf16, with the random bits of half as many counters in each row."""
    encoded = exact.view(torch.int32)
    encoded += halves(bits, exact.shape[1])
    encoded &= ~_LOW_16
    return exact.to(torch.bfloat16)


def halves(bits: Tensor, block: int) -> Tensor:
    """16 random bits, int32 [n, block], of 32 for half as many, [n, (block + 1) // 2]."""
    width = bits.shape[1]
    return torch.cat([bits & _LOW_16, (bits >> 16)[:, : block - width] & _LOW_16], dim=1)


def round_with_compensation(exact: Tensor, compensation: Tensor) -> Tensor:
    """The nearest bf16 of `exact` (fp32); what it misses goes to `compensation` (bf16), to be added next time.

    Together they hold 16 bits of the weight (Zamirai et al. 2020, "Revisiting BFloat16 Training", algorithm 1).
    """
    rounded = exact.to(torch.bfloat16)
    compensation.copy_(exact - rounded)
    return rounded


def _signed_32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value

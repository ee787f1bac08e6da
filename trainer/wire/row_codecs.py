"""Rows of fp32 numbers as bytes on the wire, and back: bf16 rounded at random, or integers of 8 or 4 bits with a scale.

A row is a block of one tensor's numbers. What is drawn for it is a function of a key and of the row's own number, so
that it does not hang on which worker rounds it, and in which company. NaN and infinity stay what is not finite: each
worker that gets them sees it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from trainer.keyed import draw_seed
from trainer.optim.rounding import cut_at_random, halves, rounding_key, scrambled
from trainer.wire.wire_cost import BLOCK, CHUNK_ELEMENTS, ROW_BYTES

_LOW_16 = 0xFFFF
_SMALLEST_SCALE = 2.0**-126  # that is no denormal
_UNIT = 2.0**-16
_ROW = 256  # numbers that draw together where a tensor is rounded by itself


class Draws(NamedTuple):
    """What random numbers of rows are a function of.

    Attributes:
        ids: of the rows, int32 [n] on their device.
        key: two numbers of 32 bits.
    """

    ids: Tensor
    key: tuple[int, int]

    def bits(self, width: int) -> Tensor:
        """32 random bits as int32 [n, width]."""
        counters = self.ids.unsqueeze(1) * width + torch.arange(width, dtype=torch.int32, device=self.ids.device)
        return scrambled(counters, self.key)

    def of(self, begin: int, end: int) -> "Draws":
        """Of the rows from `begin` to `end`."""
        return Draws(self.ids[begin:end], self.key)


def key_of(*parts: int | str) -> tuple[int, int]:
    """The key of what `parts` name."""
    return rounding_key(draw_seed("exchange", *parts))


def first_id(name: str) -> int:
    """The number of a tensor's first row; whatever else trains, it is the same."""
    return draw_seed("row", name) & 0x7FFFFF


def chunks(num_rows: int, block: int) -> Iterator[tuple[int, int]]:
    """Rows that are worked on at once, from and to."""
    step = max(1, CHUNK_ELEMENTS // block)
    for begin in range(0, num_rows, step):
        yield begin, min(begin + step, num_rows)


def round_at_random(rows: Tensor, draws: Draws) -> Tensor:
    """bf16 neighbours of fp32 numbers [n, block], with these as their expectation; `rows` stay as they are."""
    rounded = torch.empty_like(rows, dtype=torch.bfloat16)
    block = rows.shape[1]
    for begin, end in chunks(*rows.shape):
        part = rows[begin:end]
        # A NaN with all bits set would become a zero.
        wrong = part.isnan()
        bits = draws.of(begin, end).bits((block + 1) // 2)
        rounded[begin:end] = cut_at_random(part.clone(), bits).masked_fill_(wrong, torch.nan)
    return rounded


def rounded_at_random(exact: Tensor, name: str, *key: int | str) -> Tensor:
    """bf16 of a whole fp32 tensor, rounded as `round_at_random` does, by what `key` and its name say."""
    flat = exact.reshape(-1)
    padded = flat if len(flat) % _ROW == 0 else nn.functional.pad(flat, (0, -len(flat) % _ROW))
    rows = padded.view(-1, _ROW)
    ids = torch.arange(len(rows), dtype=torch.int32, device=exact.device) + first_id(name)
    return round_at_random(rows, Draws(ids, key_of(*key))).view(-1)[: len(flat)].view(exact.shape)


class RowCodec(Protocol):
    """A way to write rows."""

    @property
    def block(self) -> int:
        """Numbers in a row."""
        ...

    @property
    def row_bytes(self) -> int:
        """Of a row as it is written."""
        ...

    def encode(self, rows: Tensor, draws: Draws | None) -> Tensor:
        """uint8 [n, row_bytes] of fp32 [n, block], rounded at random; without `draws` to the nearest."""
        ...

    def decode(self, encoded: Tensor) -> Tensor:
        """fp32 [n, block] of uint8 [n, row_bytes]."""
        ...


@dataclass(frozen=True)
class Bf16Rows:
    """Two bytes a number; what is bf16 already stays as it is."""

    block: int = BLOCK["bf16"]
    row_bytes: int = ROW_BYTES["bf16"]

    def encode(self, rows: Tensor, draws: Draws | None) -> Tensor:
        """As in `RowCodec`; always at random."""
        assert draws is not None, "bf16 is never rounded to the nearest"
        return round_at_random(rows, draws).view(torch.uint8)

    def decode(self, encoded: Tensor) -> Tensor:
        """As in `RowCodec`."""
        return encoded.view(torch.bfloat16).float()


@dataclass(frozen=True)
class IntegerRows:
    """Whole steps from -largest to largest, of which the farthest number of a row is the last (Markov et al. 2022,
    "CGX", arXiv 2111.08617, after QSGD). The scale is a bf16 that is rounded up, so that nothing is cut off.

    Attributes:
        bits: 8 or 4.
    """

    bits: int
    block: int
    row_bytes: int

    @property
    def _largest(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def encode(self, rows: Tensor, draws: Draws | None) -> Tensor:
        """As in `RowCodec`. A row with a number that is not finite has the scale NaN, and comes back as NaN."""
        scale = _rounded_up(rows.abs().amax(dim=1, keepdim=True), self._largest)
        steps = rows / scale
        if draws is None:
            steps.round_()
        else:
            drawn = halves(draws.bits(self.block // 2), self.block).float().add_(0.5).mul_(_UNIT)
            steps.add_(drawn).floor_()
        steps.nan_to_num_(0.0).clamp_(-self._largest, self._largest)
        whole = steps.to(torch.int8)
        if self.bits == 4:
            low, high = whole.chunk(2, dim=1)
            whole = (low & 15) | (high << 4)
        return torch.cat([whole.view(torch.uint8), scale.to(torch.bfloat16).view(torch.uint8)], dim=1)

    def decode(self, encoded: Tensor) -> Tensor:
        """As in `RowCodec`."""
        scale = encoded[:, -2:].contiguous().view(torch.bfloat16).float()
        whole = encoded[:, :-2].view(torch.int8)
        if self.bits == 4:
            whole = torch.cat([(whole << 4) >> 4, whole >> 4], dim=1)
        return whole.float().mul_(scale)


def _rounded_up(farthest: Tensor, largest: int) -> Tensor:
    """The scale of each row, fp32 [n, 1] with the bits of a bf16; NaN where it is not finite."""
    scale = (farthest / largest).clamp_min_(_SMALLEST_SCALE)
    encoded = scale.view(torch.int32)
    encoded += _LOW_16
    encoded &= ~_LOW_16
    return torch.where(farthest.isfinite(), scale, torch.nan)


ROW_CODECS: dict[str, RowCodec] = {
    "bf16": Bf16Rows(),
    "int8": IntegerRows(8, BLOCK["int8"], ROW_BYTES["int8"]),
    "int4": IntegerRows(4, BLOCK["int4"], ROW_BYTES["int4"]),
}
"""By `exchange.method`."""

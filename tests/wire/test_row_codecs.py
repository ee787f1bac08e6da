"""Rows on the wire: what comes back, on the mean and at most, and what is not finite stays so."""

import pytest
import torch
from torch import Tensor

from trainer.wire.row_codecs import ROW_CODECS, Draws, key_of, round_at_random
from trainer.wire.wire_cost import BLOCK, CHUNK_ELEMENTS

METHODS = ("bf16", "int8", "int4")
CANONICAL_NAN = 0x7FFFFFFF  # what a card's arithmetic gives


def rows_of(method: str, count: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.logspace(-12, 3, count).unsqueeze(1)
    return torch.randn(count, BLOCK[method], generator=generator) * sizes


def draws(count: int, seed: int = 0, first: int = 100) -> Draws:
    return Draws(torch.arange(first, first + count, dtype=torch.int32), key_of("test", seed))


def scales(method: str, rows: Tensor) -> Tensor:
    """The distance between neighbours of each row, at least; a scale of bf16 is up to 1/128 more."""
    largest = {"int8": 127, "int4": 7}[method]
    return rows.abs().amax(dim=1, keepdim=True) / largest


@pytest.mark.parametrize("method", METHODS)
def test_the_mean_over_many_draws_is_the_number(method: str) -> None:
    rows, codec, count = rows_of(method), ROW_CODECS[method], 600
    gap = 2**-7 * rows.abs() if method == "bf16" else scales(method, rows) * (1 + 2**-7)
    back = torch.stack([codec.decode(codec.encode(rows, draws(len(rows), seed))) for seed in range(count)]).double()
    off = (back.mean(dim=0) - rows.double()) / gap
    assert float(off.abs().max()) < 5 * 0.5 / count**0.5
    assert float(off.mean().abs()) < 5 * 0.5 / (count * off.numel()) ** 0.5
    assert float(back.std(dim=0).max()) > 0


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_the_nearest_is_half_a_step_away_and_a_draw_one(method: str) -> None:
    rows, codec = rows_of(method), ROW_CODECS[method]
    step = scales(method, rows) * (1 + 2**-7)
    nearest, drawn = (codec.decode(codec.encode(rows, draw)) for draw in (None, draws(len(rows))))
    assert bool(((nearest - rows).abs() <= 0.5 * step * (1 + 1e-5)).all())
    assert bool(((drawn - rows).abs() <= step * (1 + 1e-5)).all())


def test_what_is_bf16_already_is_not_changed() -> None:
    rows, codec = rows_of("bf16").bfloat16().float(), ROW_CODECS["bf16"]
    assert torch.equal(codec.decode(codec.encode(rows, draws(len(rows)))), rows)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_draws_the_same_in_any_company(method: str) -> None:
    rows, codec = rows_of(method), ROW_CODECS[method]
    whole = codec.encode(rows, draws(6))
    assert whole.shape == (6, codec.row_bytes)
    assert torch.equal(whole[2:5], codec.encode(rows[2:5].clone(), draws(6).of(2, 5)))
    assert torch.equal(whole[2:5], codec.encode(rows[2:5].clone(), draws(3, first=102)))
    assert not torch.equal(whole[2:5], codec.encode(rows[2:5].clone(), draws(3, seed=1, first=102)))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_finite_stays_so(method: str) -> None:
    rows, codec = rows_of(method), ROW_CODECS[method]
    rows[1, 3], rows[2, 5] = torch.inf, -torch.inf
    rows[4].view(torch.int32)[7] = CANONICAL_NAN
    for draw in (draws(6), *([] if method == "bf16" else [None])):
        back = codec.decode(codec.encode(rows, draw))
        assert not back[1, 3].isfinite() and not back[2, 5].isfinite() and back[4, 7].isnan()
        assert bool(back[[0, 3, 5]].isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_zeros_stay_zeros(method: str) -> None:
    codec = ROW_CODECS[method]
    assert not bool(codec.decode(codec.encode(torch.zeros(2, codec.block), draws(2))).any())


def test_large_tensors_are_rounded_in_pieces_as_if_at_once() -> None:
    count = CHUNK_ELEMENTS // 256 + 3
    rows = torch.linspace(-1, 1, count * 256).view(count, 256)
    rounded = round_at_random(rows, draws(count))
    assert torch.equal(rounded[-4:], round_at_random(rows[-4:], draws(4, first=100 + count - 4)))
    assert float((rounded.float() - rows).abs().max()) < 2**-7

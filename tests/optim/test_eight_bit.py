"""8-bit moments: the paper's map, nearest codes, and blocks that never cross a row."""

import pytest
import torch

from trainer.optim.eight_bit import (
    block_size,
    blocks_per_row,
    code_tables,
    dequantize,
    dynamic_map,
    quantize,
    takes_8_bits,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("shape", "block", "eight_bit"),
    [
        ((1280, 1280), 256, True),
        ((640, 640), 160, True),
        ((320, 320, 3, 3), 240, True),
        ((4, 320, 3, 3), 240, True),
        ((10240,), 1, False),
        ((320, 4, 3, 3), 36, True),
        ((16, 16), 16, False),
        ((5000, 257), 1, False),
        ((), 1, False),
        ((0, 8), 8, False),
    ],
)
def test_blocks_divide_rows(shape: tuple[int, ...], block: int, eight_bit: bool) -> None:
    assert block_size(shape) == block
    assert takes_8_bits(shape) == eight_bit
    assert blocks_per_row(shape) * block == torch.empty(shape[1:], device="meta").numel()


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_papers(signed: bool) -> None:
    values = dynamic_map(signed)
    assert len(values) == 256 and bool((values.diff() > 0).all())
    assert (float(values[-1]), 0.0 in values) == (1.0, True)
    assert float(values[values > 0].min()) == pytest.approx(5.5e-7 if signed else 3.25e-7, rel=1e-5)
    library = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(values, library.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0])
def test_codes_are_the_nearest(signed: bool, size: float) -> None:
    torch.manual_seed(0)
    moments = torch.randn(200, 240) ** 3 * size
    moments = moments if signed else moments.abs()
    codes, scales = torch.empty(200, 240, dtype=torch.uint8), torch.empty(200, 1)
    tables = code_tables(signed, CPU)
    quantize(moments, codes, scales, tables)
    assert torch.equal(scales[:, 0], moments.abs().amax(dim=1))
    values = dynamic_map(signed)
    distance = ((moments / scales).unsqueeze(-1) - values).abs()
    taken = distance.gather(-1, codes.long().unsqueeze(-1))[..., 0]
    assert bool((taken <= distance.amin(dim=-1) + 1e-7).all())
    assert torch.equal(dequantize(codes, scales, tables), values[codes.long()] * scales)


def test_zero_nan_and_infinity() -> None:
    tables = code_tables(True, CPU)
    moments = torch.zeros(4, 32)
    moments[1, 3], moments[2, 5] = torch.nan, torch.inf
    moments[3] = 1e-42  # below the smallest normal number
    codes, scales = torch.empty(4, 32, dtype=torch.uint8), torch.empty(4, 1)
    quantize(moments, codes, scales, tables)
    back = dequantize(codes, scales, tables)
    assert bool((back[0] == 0).all()) and bool(back[1].isnan().all()) and bool(scales[2].isinf().all())
    assert bool((back[3].abs() <= 1e-42).all())

"""AdamW's arithmetic over some blocks of one parameter: as PyTorch's operations, or fused by torch.compile."""

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.optim.eight_bit import CodeTables, code_tables, dequantize, quantize
from trainer.optim.rounding import round_stochastically, round_with_compensation

_log = logging.getLogger(__name__)


class Factors(NamedTuple):
    """The numbers of AdamW (Loshchilov and Hutter 2019, algorithm 2) at one step of one parameter.

    The weight's change is -(step_size * first / (sqrt(second) + eps) + decay * weight), with the bias corrections of
    both moments within `step_size` and `eps`. `gradient` is what gradients are taken times. What changes from step to
    step is a tensor (fp32 scalar), so that compiled code stays the same.
    """

    beta1: float
    beta2: float
    step_size: Tensor
    eps: Tensor
    decay: Tensor
    gradient: Tensor


class Chunk(NamedTuple):
    """Views [n, block] of a part of a parameter, its gradient and its state; scales are [n, 1]."""

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    first_scale: Tensor | None
    second_scale: Tensor | None
    compensation: Tensor | None

    def blocks(self, start: int, stop: int) -> "Chunk":
        """Some of the blocks."""

        def cut(part: Tensor | None) -> Tensor | None:
            return None if part is None else part[start:stop]

        whole = self.weight[start:stop], self.gradient[start:stop], self.first[start:stop], self.second[start:stop]
        return Chunk(*whole, cut(self.first_scale), cut(self.second_scale), cut(self.compensation))


Tables = tuple[CodeTables, CodeTables] | None
Update = Callable[[Chunk, Factors, Tables, int, Tensor | None], None]


def update_chunk(chunk: Chunk, factors: Factors, tables: Tables, first_block: int, key: Tensor | None) -> None:
    """Update one chunk in place.

    Args:
        tables: of 8-bit moments.
        first_block: number of the chunk's first block within the whole parameter.
        key: of the stochastic rounding.
    """
    gradient = chunk.gradient.to(torch.float32, copy=True).mul_(factors.gradient)
    first, second = chunk.first, chunk.second
    if tables is not None:
        assert chunk.first_scale is not None and chunk.second_scale is not None
        first = dequantize(chunk.first, chunk.first_scale, tables[0])
        second = dequantize(chunk.second, chunk.second_scale, tables[1])
    first.mul_(factors.beta1).add_(gradient, alpha=1 - factors.beta1)
    second.mul_(factors.beta2).addcmul_(gradient, gradient, value=1 - factors.beta2)
    change = (first * factors.step_size).div_(second.sqrt().add_(factors.eps))
    if tables is not None:
        assert chunk.first_scale is not None and chunk.second_scale is not None
        quantize(first, chunk.first, chunk.first_scale, tables[0])
        quantize(second, chunk.second, chunk.second_scale, tables[1])
    if chunk.weight.dtype == torch.float32:
        chunk.weight.sub_(change.add_(chunk.weight * factors.decay))
        return
    weight = chunk.weight.to(torch.float32)
    change.add_(weight * factors.decay)
    if key is not None:
        chunk.weight.copy_(round_stochastically(weight.sub_(change), first_block, key))
    else:
        assert chunk.compensation is not None
        exact = weight.add_(change.neg_().add_(chunk.compensation))
        chunk.weight.copy_(round_with_compensation(exact, chunk.compensation))


def compiled_update(eight_bit: bool, rounding: str | None, device: torch.device) -> Update | None:
    """`update_chunk` fused, if this machine has a compiler and the result computes the same; else None.

    Args:
        eight_bit, rounding: as `BlockAdamW` is going to use it.
    """
    for tables in (code_tables(True, device), code_tables(False, device)):
        for table in (tables.values, tables.cells):
            torch._dynamo.mark_static(table)
    options: dict[str, str | int | bool | Callable[..., object]] = {
        # In this process: the compiler's own pool of processes would outlive the two or three compilations.
        "compile_threads": 1,
        # Codes and cells are within their tables by dtypes and masks; to check each takes longer than to look it up.
        "assert_indirect_indexing": False,
        # Else what bf16 misses is computed from a number that was never rounded, and is always 0.
        "emulate_precision_casts": rounding == "kahan",
    }
    update = torch.compile(update_chunk, dynamic=True, options=options)
    try:
        for quantized in {False, eight_bit}:
            _require_same(update, quantized, rounding, device)
    except (RuntimeError, OSError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _log.warning("AdamW's arithmetic is not compiled, and takes longer: %s", reason)
        return None
    return update


@torch.no_grad()
def _require_same(update: Update, quantized: bool, rounding: str | None, device: torch.device) -> None:
    """Compare a chunk's results; compiled ones may differ in the last bit.

    Raises:
        RuntimeError: they differ by more, or the compiler fails.
    """
    draw, rows, block = torch.Generator().manual_seed(0), 50, 160
    dtype = torch.bfloat16 if rounding else torch.float32
    start = Chunk(
        weight=torch.randn(rows, block, generator=draw).mul_(0.02).to(dtype),
        gradient=torch.randn(rows, block, generator=draw).mul_(1e-3).to(dtype),
        first=torch.randint(256, (rows, block), generator=draw, dtype=torch.uint8)
        if quantized
        else torch.randn(rows, block, generator=draw) * 1e-4,
        second=torch.randint(256, (rows, block), generator=draw, dtype=torch.uint8)
        if quantized
        else torch.rand(rows, block, generator=draw) * 1e-7,
        first_scale=torch.full((rows, 1), 1e-4) if quantized else None,
        second_scale=torch.full((rows, 1), 1e-7) if quantized else None,
        compensation=torch.zeros(rows, block, dtype=dtype) if rounding == "kahan" else None,
    )
    scalars = torch.tensor([1e-5, 1e-8, 1e-7, 1.0], device=device).unbind()
    factors = Factors(0.9, 0.999, *scalars)
    tables = (code_tables(True, device), code_tables(False, device)) if quantized else None
    key = torch.tensor([12345, 67890], dtype=torch.int32, device=device) if rounding == "stochastic" else None
    plain, fused = (
        Chunk(*(None if part is None else part.to(device, copy=True) for part in start))  # pyright: ignore[reportArgumentType]
        for _ in range(2)
    )
    update_chunk(plain, factors, tables, 3, key)
    update(fused, factors, tables, 3, key)
    for name, one, two in zip(Chunk._fields, plain, fused, strict=True):
        if one is None or two is None:
            continue
        wide = one.float(), two.float()
        off = ~((wide[0] - wide[1]).abs() <= 1e-5 * wide[0].abs())  # nan is off as well
        if float(off.float().mean()) > 1e-2:
            raise RuntimeError(f"compiled, the {name} differs from the uncompiled")

"""What an exchange of gradients sends and holds, in bytes on each worker: by arithmetic on shapes; no torch."""

import math
from collections.abc import Iterable, Sequence

from trainer.config.sections.exchange_config import ExchangeConfig

BLOCK = {"bf16": 256, "int8": 256, "int4": 128}
"""Numbers in a row, which travels as a whole."""
ROW_BYTES = {"bf16": 2 * 256, "int8": 256 + 2, "int4": 128 // 2 + 2}
"""Of a row on the wire: its numbers, and in integers a scale of two bytes."""
SMALLEST = 1024
"""Weights of a tensor that is rounded to integers, or made a product. Smaller ones, and norms and biases, are a
thousandth of all weights and not worth an error; they travel in fp32, as CGX leaves them alone too."""
CHUNK_ELEMENTS = 1 << 22
"""Numbers that are rounded at once."""
_CHUNK_BYTES = 15  # for each of them while it is rounded
_SAVING = 2  # of a product of thin matrices, at least, or the gradient travels in fp32 (PowerSGD's own rule)

Shape = Sequence[int]


def is_small(shape: Shape) -> bool:
    """Whether a tensor travels in fp32 where others are rounded to integers."""
    return len(shape) < 2 or math.prod(shape) < SMALLEST


def rank_of(shape: Shape, rank: int) -> int:
    """Columns of the thin matrices whose product is sent in place of a tensor; 0: it is sent as it is."""
    if is_small(shape):
        return 0
    rows, columns = shape[0], math.prod(shape[1:])
    rank = min(rows, columns, rank)
    return rank if (rows + columns) * rank * _SAVING < rows * columns else 0


def is_changed(exchange: ExchangeConfig, shape: Shape) -> bool:
    """Whether what workers get of a tensor differs from the mean of its gradients."""
    if exchange.method == "plain":
        return False
    if exchange.method == "powersgd":
        return rank_of(shape, exchange.rank) > 0
    return exchange.method == "bf16" or not is_small(shape)


def sent_bytes(exchange: ExchangeConfig, shapes: Iterable[Shape], world: int, stored_bytes: int) -> int:
    """What each worker sends in a step that exchanges tensors of these shapes once.

    A ring of W workers sends 2 (W-1)/W of what is averaged. So does an exchange of shares, whose owners add them up,
    and of the sums. Rows that make the shares equal, at most W-1 for each of DDP's buckets, are not counted.

    Args:
        stored_bytes: of one weight, and of its gradient.
    """
    content = sum(_content(exchange, shape, stored_bytes) for shape in shapes)
    return 2 * content * (world - 1) // world


def _content(exchange: ExchangeConfig, shape: Shape, stored_bytes: int) -> int:
    """Bytes of what is averaged."""
    size = math.prod(shape)
    if exchange.method == "plain":
        return size * stored_bytes
    if not is_changed(exchange, shape):
        return size * 4
    if exchange.method == "powersgd":
        return 4 * rank_of(shape, exchange.rank) * (shape[0] + size // shape[0])
    return -(-size // BLOCK[exchange.method]) * ROW_BYTES[exchange.method]


def kept_bytes(exchange: ExchangeConfig, shapes: Iterable[Shape]) -> int:
    """What a worker keeps between steps: errors in bf16, and of products the second matrix in fp32."""
    return sum(sum(_kept(exchange, shape)) for shape in shapes)


def saved_bytes(exchange: ExchangeConfig, shapes: Iterable[Shape], world: int) -> int:
    """What a checkpoint holds of that: every worker's errors, and once the matrices."""
    kept = [_kept(exchange, shape) for shape in shapes]
    return sum(errors * world + basis for errors, basis in kept)


def _kept(exchange: ExchangeConfig, shape: Shape) -> tuple[int, int]:
    if not (exchange.keeps_errors and is_changed(exchange, shape)):
        return 0, 0
    size = math.prod(shape)
    basis = 4 * rank_of(shape, exchange.rank) * (size // shape[0]) if exchange.method == "powersgd" else 0
    return 2 * size, basis


def scratch_bytes(exchange: ExchangeConfig, shapes: Sequence[Shape], world: int) -> int:
    """The most that is held for a moment while one of DDP's buckets, with tensors of these shapes, is exchanged."""
    if exchange.method == "plain":
        return 0
    changed = [shape for shape in shapes if is_changed(exchange, shape)]
    flat = 4 * sum(math.prod(shape) for shape in shapes if not is_changed(exchange, shape))
    if not changed:
        return flat
    largest = max(math.prod(shape) for shape in changed)
    if exchange.method == "powersgd":
        thin = sum(_content(exchange, shape, 4) for shape in changed)
        return 4 * largest + 2 * thin + _CHUNK_BYTES * min(CHUNK_ELEMENTS, largest)
    block = BLOCK[exchange.method]
    rows = sum(-(-math.prod(shape) // block) for shape in changed)
    rows += -rows % world
    wide, narrow = 4 * block * rows, ROW_BYTES[exchange.method] * rows
    chunk = (_CHUNK_BYTES + 2 * (exchange.method == "bf16")) * min(CHUNK_ELEMENTS, block * rows)
    moments = [
        narrow + chunk,  # this worker's rows are rounded
        2 * narrow,  # and exchanged
        narrow + wide // world,  # a share is added up
        (wide + narrow) // world + chunk,  # and rounded
        wide // 2 + chunk,  # all means become gradients in bf16
    ]
    if exchange.keeps_errors:
        moments.append(wide // 2 + narrow // world + chunk)
    return wide + max(moments)


def told(exchange: ExchangeConfig, shapes: Sequence[Shape], world: int, stored_bytes: int) -> str:
    """A line for the run's log: how gradients travel, and in how many bytes."""
    sent = sent_bytes(exchange, shapes, world, stored_bytes)
    if exchange.method == "plain":
        return f"gradients travel in {8 * stored_bytes} bits: each worker sends {_size(sent)} a step"
    plain = sent_bytes(ExchangeConfig(), shapes, world, stored_bytes)
    how = {
        "bf16": "in bf16, rounded at random",
        "int8": "in 8 bits",
        "int4": "in 4 bits",
        "powersgd": f"as products of rank {exchange.rank}",
    }[exchange.method]
    if exchange.method in ("int8", "int4"):
        how += ", with error feedback" if exchange.keeps_errors else ", rounded at random"
    if exchange.plain_steps:
        how += f", after step {exchange.plain_steps}"
    return f"gradients travel {how}: each worker sends {_size(sent)} a step, {plain / max(sent, 1):.2f} times less"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"

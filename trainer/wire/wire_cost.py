"""What an exchange of gradients, or an average of weights, sends and holds on each worker: by arithmetic; no torch."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

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
AVERAGED_AT_ONCE = 1 << 24
"""Weights that are averaged at once, at most, or one tensor."""
_CHUNK_BYTES = 15  # for each of them while it is rounded
_DIFFERENCE_BYTES = 4  # of a weight to the common one, as `plain` sends it
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
    """What each worker sends in a step that exchanges tensors of these shapes once, or now and then: in the mean.

    A ring of W workers sends 2 (W-1)/W of what is averaged. So does an exchange of shares, whose owners add them up,
    and of the sums. Rows that make the shares equal, at most W-1 for each of DDP's buckets, are not counted.

    Args:
        stored_bytes: of one weight, and of its gradient.
    """
    each = _DIFFERENCE_BYTES if exchange.averages_weights else stored_bytes
    content = sum(_content(exchange, shape, each) for shape in shapes)
    return 2 * content * (world - 1) // world // exchange.average_every


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
    if exchange.averages_weights:
        return _told_average(exchange, sent)
    if exchange.method == "plain":
        return f"gradients travel in {8 * stored_bytes} bits: each worker sends {_size(sent)} a step"
    plain = sent_bytes(ExchangeConfig(), shapes, world, stored_bytes)
    how = _told_method(exchange)
    return f"gradients travel {how}: each worker sends {_size(sent)} a step, {plain / max(sent, 1):.2f} times less"


def _told_method(exchange: ExchangeConfig) -> str:
    how = {
        "plain": f"in {8 * _DIFFERENCE_BYTES} bits",
        "bf16": "in bf16, rounded at random",
        "int8": "in 8 bits",
        "int4": "in 4 bits",
        "powersgd": f"as products of rank {exchange.rank}",
    }[exchange.method]
    if exchange.method in ("int8", "int4"):
        how += ", with error feedback" if exchange.keeps_errors else ", rounded at random"
    if exchange.plain_steps:
        how += f", after step {exchange.plain_steps}"
    return how


def _told_average(exchange: ExchangeConfig, sent: int) -> str:
    which = "weights are averaged" if exchange.fragments == 1 else f"each of {exchange.fragments} fragments is averaged"
    late = f", and takes effect {exchange.overlap_steps} later" if exchange.overlap_steps else ""
    return (
        f"{which} every {exchange.average_every} steps{late}; differences travel {_told_method(exchange)}: "
        f"each worker sends {_size(sent)} a step in the mean"
    )


def cut_evenly(sizes: Mapping[str, int], number: int) -> list[list[str]]:
    """Names in their order, in at most `number` runs of about as many elements; none is empty."""
    total, begun = sum(sizes.values()), 0
    runs: list[list[str]] = [[] for _ in range(number)]
    for name, size in sizes.items():
        runs[min(number - 1, number * (begun + size // 2) // max(total, 1))].append(name)
        begun += size
    return [run for run in runs if run]


def averaged_together(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in groups that are averaged at once: whole tensors, up to a bounded size."""
    group, filled = list[str](), 0
    for name, size in sizes.items():
        if group and filled + size > AVERAGED_AT_ONCE:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    if group:
        yield group


def outer_bytes(shapes: Iterable[Shape]) -> int:
    """Of the common weights and their momentum in fp32, wherever they are held."""
    return 8 * sum(math.prod(shape) for shape in shapes)


def travelling_bytes(exchange: ExchangeConfig, shapes: Mapping[str, Shape]) -> int:
    """Of the largest fragment's differences, which lie beside all else while they travel and steps are computed."""
    if not exchange.overlap_steps:
        return 0
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    runs = [sum(sizes[name] for name in run) for run in cut_evenly(sizes, exchange.fragments)]
    at_once = min(len(runs), -(-exchange.overlap_steps * exchange.fragments // exchange.average_every))
    return _DIFFERENCE_BYTES * at_once * max(runs, default=0)


def average_scratch_bytes(exchange: ExchangeConfig, shapes: Mapping[str, Shape], world: int) -> int:
    """The most that is held for a moment, after a step, while weights are averaged: two groups, one on its way."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    groups = [[shapes[name] for name in group] for group in averaged_together(sizes)]
    held = [_DIFFERENCE_BYTES * sum(map(math.prod, group)) for group in groups]
    working = max((scratch_bytes(exchange, group, world) for group in groups), default=0)
    mixed = 12 * max(sizes.values(), default=0) if exchange.kept_share else 0
    return sum(sorted(held)[-2:]) + max(working, mixed)


def saved_of_average(shapes: Iterable[Shape], world: int, stored_bytes: int, optimizer_bytes: float) -> int:
    """What a checkpoint holds more where workers take steps each by itself, between two averages.

    Args:
        stored_bytes, optimizer_bytes: of one weight, and of its optimizer's state on each worker.
    """
    narrower = 4 if stored_bytes < 4 else 0
    each = 4 + narrower + world * stored_bytes + (world - 1) * optimizer_bytes
    return round(each * sum(math.prod(shape) for shape in shapes))


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.2f} MB"

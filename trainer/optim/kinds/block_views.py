"""This worker's part of a parameter cut into blocks, as chunks that are updated one after the other or in threads."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.optim.adamw import ELEMENTS_WORTH_THREADS
from trainer.optim.eight_bit import block_size, blocks_per_row
from trainer.parallel.local_shard import local_part


class Blocks(NamedTuple):
    """Views [n, block] of some blocks of this worker's part of a parameter; scales are [n, 1].

    Attributes:
        quantized: names of the state that is codes.
        first: number of this worker's first block within the whole parameter.
        finish: to be called when the weights are changed.
    """

    weight: Tensor
    gradient: Tensor | None
    state: Mapping[str, Tensor]
    quantized: tuple[str, ...]
    first: int
    finish: Callable[[], None]


def blocks_of(parameter: nn.Parameter, state: Mapping[str, Tensor], start: int, stop: int) -> Blocks:
    """The blocks from `start` to `stop` of this worker's part; scalars of the state are left out."""
    (weight, first_row), block = local_part(parameter), block_size(parameter.shape)
    weight = weight.detach()
    number = weight.numel() // block

    def cut(tensor: Tensor, width: int = block) -> Tensor:
        return tensor.contiguous().view(number, width)[start:stop]

    views = {key: cut(value, 1 if key.endswith("_scale") else block) for key, value in state.items() if value.ndim}
    gradient = None if parameter.grad is None else cut(local_part(parameter.grad)[0].detach())
    rows, finish = cut(weight), _nothing
    if not weight.is_contiguous():  # channels-last weights are updated in a copy
        finish = partial(_put_back, weight, rows, start * block)
    quantized = tuple(key for key, value in views.items() if value.dtype == torch.uint8)
    return Blocks(rows, gradient, views, quantized, first_row * blocks_per_row(parameter.shape), finish)


def _nothing() -> None:
    """Weights were changed where they are."""


def _put_back(weight: Tensor, rows: Tensor, first: int) -> None:
    """Elements from the `first` on, in the order of a contiguous tensor, into one that is laid out otherwise."""
    places = torch.arange(first, first + rows.numel(), device=weight.device)
    weight.index_put_(torch.unravel_index(places, weight.shape), rows.reshape(-1))


def exact_of(weight: Tensor, compensation: Tensor | None) -> Tensor:
    """fp32 weights themselves, bf16 ones in an fp32 copy with what they miss."""
    if weight.dtype == torch.float32:
        return weight
    exact = weight.to(torch.float32)
    return exact if compensation is None else exact.add_(compensation.view(exact.shape))


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """This worker's rows of it."""
    assert parameter.grad is not None
    return local_part(parameter.grad)[0].detach()


def in_chunks(
    work: Callable[[int, int], None], parameter: nn.Parameter, at_a_time: int, pool: ThreadPoolExecutor
) -> None:
    """Give `work` all blocks of this worker's part from and to which number, some at a time, in threads if it pays."""
    weight, _ = local_part(parameter)
    number = weight.numel() // block_size(parameter.shape)
    threads = torch.get_num_threads() if weight.device.type == "cpu" and weight.is_contiguous() else 1
    threads = 1 if weight.numel() < ELEMENTS_WORTH_THREADS else threads
    at_a_time = max(min(at_a_time, -(-number // threads)), 1)
    starts = range(0, number, at_a_time)

    @torch.no_grad()
    def run(starts: range) -> None:
        for start in starts:
            work(start, start + at_a_time)

    if threads > 1:
        list(pool.map(run, [starts[i::threads] for i in range(threads)]))
    else:
        run(starts)

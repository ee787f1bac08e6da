"""Faults of numbers made on purpose (`trainer.faults`), and of speed, each in the place where its like would come up.

nan_loss      the worker's losses of that step are NaN, and with them everybody's gradients
loss_spike    they are multiplied by the argument, 1e3 without one
nan_gradient  one number of the worker's gradients is NaN, after they have been exchanged
flip_bit      one bit of the worker's weights is another one after that step
slow          the worker's forward passes take so many seconds more, each
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from trainer.data.loader import Batch
from trainer.faults import planned
from trainer.parallel.sharding import local_tensor
from trainer.train.step import StepParts


def with_faults(parts: StepParts, step: int) -> StepParts:
    """What the step that will be the run's `step` is taken with: as it is, but for planned faults."""
    rank = parts.comm.rank
    if planned("nan_loss", rank, step) is not None:
        parts = replace(parts, weigh=partial(_weigh, parts, float("nan")))
    if (argument := planned("loss_spike", rank, step)) is not None:
        parts = replace(parts, weigh=partial(_weigh, parts, float(argument or 1e3)))
    if planned("nan_gradient", rank, step) is not None:
        parts = replace(parts, before_norm=partial(_poison, parts))
    if (seconds := planned("slow", rank, step)) is not None:
        parts = replace(parts, around_forward=partial(_slowly, parts, float(seconds)))
    return parts


def _weigh(parts: StepParts, factor: float, batch: Batch) -> Tensor:
    return parts.weigh(batch) * factor


@contextmanager
def _slowly(parts: StepParts, seconds: float) -> Iterator[None]:
    time.sleep(seconds)
    with parts.around_forward():
        yield


def _poison(parts: StepParts, loss_scale: float) -> None:
    parts.before_norm(loss_scale)
    gradient = next(p.grad for p in parts.strategy.parameters.values() if p.grad is not None)
    local_tensor(gradient).view(-1)[0] = torch.nan


@torch.no_grad()
def flip_bit_if_planned(parts: StepParts, step: int) -> None:
    """A low bit of one weight, which no loss would tell."""
    if planned("flip_bit", parts.comm.rank, step) is None:
        return
    weight = local_tensor(next(iter(parts.strategy.parameters.values()))).view(-1)
    weight.view(torch.int16)[0] ^= 1 << 6  # the next steps would round the lowest ones away

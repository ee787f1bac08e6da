"""What a kind of optimizer says of itself: the state it keeps of a weight, and how it changes the weight.

A rule computes in fp32 on some rows of one parameter, whatever the weights are held in and however they are spread:
`trainer.optim.kinds.rule_optimizer` cuts, converts, rounds and sums over workers.
"""

from collections.abc import Generator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

Scalars = dict[str, float]
Sums = Generator[Tensor, Tensor, None]
"""Yields what is to be summed over the workers that hold rows of a parameter, and is sent the sum."""


class StateTensor(NamedTuple):
    """A tensor of a parameter's state, as it is of the whole parameter.

    Attributes:
        by_rows: its first dimension is the parameter's, and is spread with it; else every worker has all of it.
        signed: of what may be kept in 8 bits.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    by_rows: bool = True
    signed: bool = True


@dataclass
class Part:
    """Some of one parameter: a chunk of its blocks [n, block], or all rows that this worker holds [rows, columns].

    Attributes:
        name, shape: of the whole parameter.
        weight: fp32, to be changed in place.
        gradient: fp32, may be overwritten.
        state: fp32, to be changed in place.
        group: the numbers of the parameter's group, `lr` among them.
        step: this one's number, from 1 on.
        numbers: what `Rule.begin` or `Rule.learn` gave.
        first_row: of this worker's rows within the whole.
    """

    name: str
    shape: tuple[int, ...]
    weight: Tensor
    gradient: Tensor
    state: Mapping[str, Tensor]
    group: Mapping[str, Any]
    step: int
    numbers: Scalars
    first_row: int = 0

    @property
    def lr(self) -> float:
        """The learning rate of this step."""
        return self.group["lr"]

    def decay(self, by: float | None = None) -> None:
        """Decoupled weight decay, at the learning rate or at `by`."""
        if self.group["weight_decay"]:
            self.weight.mul_(1 - (self.lr if by is None else by) * self.group["weight_decay"])


class Rule:
    """One kind; what a kind does not need is as it is here.

    Attributes:
        kind: its name in the configuration.
        in_chunks: each element changes by its own; then `update` gets blocks, else `updates` all rows at once.
        surveys: `survey` looks at all weights before any is changed.
        scratch_bytes: alive at once for each element that is worked on, its gradient in fp32 among them.
        whole_bytes: the same for each element of the largest whole matrix, on every worker.
    """

    kind = ""
    in_chunks = True
    surveys = False
    scratch_bytes = 32
    whole_bytes = 0

    def tensors(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, StateTensor]:
        """The state of a parameter of this name and (whole) shape, whose weights are of this dtype; all begin as 0."""
        raise NotImplementedError

    def scalars(self, group: Mapping[str, Any]) -> Scalars:
        """The numbers that are kept beside a parameter's tensors, as they begin."""
        return {}

    def fill(self, state: Mapping[str, Tensor], weight: Tensor) -> None:
        """Tensors that begin as something else than 0; `weight` is of the same rows."""

    def begin(self, scalars: Scalars, group: Mapping[str, Any], step: int) -> tuple[Scalars, Scalars]:
        """The kept numbers after this step has begun, and the numbers that its arithmetic takes."""
        return scalars, {}

    def survey(self, part: Part) -> Tensor:
        """Take the gradient into the state, and return sums over the part, fp64 [n]."""
        raise NotImplementedError

    def learn(
        self, scalars: Scalars, numbers: Scalars, sums: list[float], group: Mapping[str, Any]
    ) -> tuple[Scalars, Scalars]:
        """What follows from the sums over all weights: as `begin` returns it."""
        raise NotImplementedError

    def update(self, part: Part) -> None:
        """Change the weight, and the state."""
        raise NotImplementedError

    def updates(self, part: Part) -> Sums:
        """The same with sums over workers in between."""
        raise NotImplementedError


def adam_state(shape: tuple[int, ...]) -> dict[str, StateTensor]:
    """Two moments."""
    return {"exp_avg": StateTensor(shape), "exp_avg_sq": StateTensor(shape, signed=False)}


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns: a convolution has one row for each filter. Of a vector, each element is a row."""
    return (shape[0] if shape else 1), prod(shape[1:])


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether rows and columns have sums that are worth more than the elements."""
    return len(shape) >= 2 and min(as_matrix(shape)) > 1

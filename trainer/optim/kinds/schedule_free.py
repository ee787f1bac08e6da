"""The two sets of weights of schedule-free AdamW: those that train, and their average, which is used and published.

The average x lies on the line through the trained y and z: x = y + (1 - 1/beta1) (z - y). It is computed where it is
wanted and never in place of y, which could not be had back to the bit. A checkpoint's components hold x, in fp32, as
its reader expects of weights; y goes with the optimizer's state.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from trainer.optim.kinds.elementwise_rules import ScheduleFreeAdamW
from trainer.optim.kinds.rule_optimizer import RuleOptimizer
from trainer.parallel.local_shard import Blend, local_part

_AT_ONCE = 1 << 24  # elements


def averages_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights to use are an average and not those that train."""
    return isinstance(optimizer, RuleOptimizer) and isinstance(optimizer.rule, ScheduleFreeAdamW)


def holds_average(optimizer: torch.optim.Optimizer, parameter: Tensor) -> bool:
    """Whether the average of a parameter is another than its trained weights: not before its first step."""
    return averages_weights(optimizer) and "z" in optimizer.state.get(parameter, {})


def average_blends(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Blend]:
    """By name, how the average of a parameter follows from its trained weights; those without are their own average."""
    if not averages_weights(optimizer):
        return {}
    group_of = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    return {
        name: Blend(optimizer.state[parameter]["z"], _towards_z(group_of[parameter]))
        for name, parameter in parameters.items()
        if holds_average(optimizer, parameter)
    }


def _towards_z(group: Mapping[str, Any]) -> float:
    return 1 - 1 / group["betas"][0]


@contextmanager
def average_in_model(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Inside, the model's weights are the average (bf16 ones its nearest); then those that train, to the bit.

    The trained ones wait in the host's memory. All workers enter, each with its rows; weights that are spread must not
    be gathered before.
    """
    blends = average_blends(optimizer, parameters)
    weights = {name: local_part(parameters[name])[0].detach() for name in blends}
    kept = {name: weight.to("cpu", copy=True) for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                for piece, other in zip(
                    weight.split(_rows(weight)), blends[name].towards.split(_rows(weight)), strict=True
                ):
                    piece.copy_(piece.float().lerp_(other.to(piece.device), blends[name].by))
        yield
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])


def _rows(weight: Tensor) -> int:
    """As many as make up some ten million elements."""
    return max(_AT_ONCE * len(weight) // max(weight.numel(), 1), 1)

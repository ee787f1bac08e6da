"""The optimizer's groups: parameters of one part that have the same learning rate and weight decay."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from trainer.config.schema import Config
from trainer.model.selection.weight_rates import Rate
from trainer.train.saved.part_times import trained_parts


@dataclass(frozen=True)
class ParameterGroup:
    """One of them.

    Attributes:
        name: the part's, where learning rate and weight decay are the part's own; else the part's, and what differs
            behind a space.
        parameters: by name.
        peak_lr: before the schedule.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    peak_lr: float
    weight_decay: float


def parameter_groups(
    config: Config, rates: Mapping[str, Rate], parameters: Mapping[str, nn.Parameter]
) -> list[ParameterGroup]:
    """Of what trains, part by part; the first group of each is the one whose learning rate is nearest to the part's.

    Args:
        rates: of parameters by name; those that it lacks have the part's own.
    """
    groups = []
    for part_name, part in trained_parts(config).items():
        lr = config.optimizer.lr if part.lr is None else part.lr
        decay = config.optimizer.weight_decay if part.weight_decay is None else part.weight_decay
        found: dict[tuple[float, float], dict[str, nn.Parameter]] = {}
        for name, parameter in parameters.items():
            if not name.startswith(f"{part_name}."):
                continue
            rate = rates.get(name, Rate())
            decays = parameter.dim() > 1 or config.optimizer.decay_norms_and_biases
            own = rate.lr_scale, decay * rate.decay_scale if decays else 0.0
            found.setdefault(own, {})[name] = parameter
        for (scale, own_decay), named in sorted(found.items(), key=lambda pair: abs(math.log(pair[0][0]))):
            differs = [f"lr x{scale!r}"] * (scale != 1.0) + [f"decay {own_decay!r}"] * (own_decay != decay)
            groups.append(ParameterGroup(" ".join([part_name, *differs]), named, lr * scale, own_decay))
    return groups

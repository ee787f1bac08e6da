"""Kinds that find the learning rate, by how far the weights are from where they began: Prodigy and D-Adapted Adam.

Both sum over all weights before any is changed, in fp64, so that workers who hold rows find what one would.
"""

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from trainer.optim.kinds.rule import Part, Rule, Scalars, StateTensor, adam_state


def _bias_correction(group: Mapping[str, Any], step: int) -> float:
    """AdamW's for both moments, as a factor of the learning rate."""
    if not group["bias_correction"]:
        return 1.0
    beta1, beta2 = group["betas"]
    return sqrt(1 - beta2**step) / (1 - beta1**step)


def _sums(*parts: Tensor) -> Tensor:
    return torch.stack([part.sum(dtype=torch.float64) for part in parts])


class Prodigy(Rule):
    """Mishchenko and Defazio 2023, algorithm 4, with weight decay decoupled, as their code has it by `decouple`."""

    kind = "prodigy"
    surveys = True

    def tensors(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, StateTensor]:
        return adam_state(shape) | {"s": StateTensor(shape), "start": StateTensor(shape, dtype)}

    def fill(self, state: Mapping[str, Tensor], weight: Tensor) -> None:
        state["start"].copy_(weight)

    def scalars(self, group: Mapping[str, Any]) -> Scalars:
        return {"d": group["d0"], "d_max": group["d0"], "d_numerator": 0.0}

    def begin(self, scalars: Scalars, group: Mapping[str, Any], step: int) -> tuple[Scalars, Scalars]:
        d = scalars["d"]
        step_size = d * group["lr"] * _bias_correction(group, step)
        beta3 = group["beta3"] if group["beta3"] is not None else sqrt(group["betas"][1])
        ahead = d / group["d0"]
        into_s = ahead * (d if group["safeguard_warmup"] else step_size)
        return scalars, {"d": d, "step_size": step_size, "beta3": beta3, "into_s": into_s, "ahead": ahead}

    def survey(self, part: Part) -> Tensor:
        (beta1, beta2), d, gradient, state = part.group["betas"], part.numbers["d"], part.gradient, part.state
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=d * (1 - beta1))
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=d * d * (1 - beta2))
        state["s"].mul_(part.numbers["beta3"]).add_(gradient, alpha=part.numbers["into_s"])
        return _sums(gradient.mul_(state["start"].float() - part.weight), state["s"].abs())

    def learn(
        self, scalars: Scalars, numbers: Scalars, sums: list[float], group: Mapping[str, Any]
    ) -> tuple[Scalars, Scalars]:
        along, size = sums
        d, d_max = scalars["d"], scalars["d_max"]
        numerator = numbers["beta3"] * scalars["d_numerator"] + numbers["ahead"] * numbers["step_size"] * along
        if size > 0 and group["lr"] > 0:
            found = group["d_coef"] * numerator / size
            d = max(d, found) if d == group["d0"] else d
            d_max = max(d_max, found)
            d = min(d_max, d * group["growth_rate"])
        return {"d": d, "d_max": d_max, "d_numerator": numerator}, numbers | {"d": d}

    def update(self, part: Part) -> None:
        step_size = part.numbers["step_size"]
        bound = part.state["exp_avg_sq"].sqrt().add_(part.numbers["d"] * part.group["eps"])
        part.decay(step_size)
        part.weight.addcdiv_(part.state["exp_avg"], bound, value=-step_size)


class DAdaptAdam(Rule):
    """Defazio and Mishchenko 2023, algorithm 5 (D-Adapted Adam), with weight decay decoupled."""

    kind = "dadapt_adam"
    surveys = True

    def tensors(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, StateTensor]:
        return adam_state(shape) | {"s": StateTensor(shape)}

    def scalars(self, group: Mapping[str, Any]) -> Scalars:
        return {"d": group["d0"], "d_numerator": 0.0}

    def begin(self, scalars: Scalars, group: Mapping[str, Any], step: int) -> tuple[Scalars, Scalars]:
        step_size = scalars["d"] * group["lr"] * _bias_correction(group, step)
        return scalars, {"step_size": step_size, "root": sqrt(group["betas"][1])}

    def survey(self, part: Part) -> Tensor:
        (beta1, beta2), gradient, state = part.group["betas"], part.gradient, part.state
        step_size, root = part.numbers["step_size"], part.numbers["root"]
        along = (state["exp_avg_sq"].sqrt().add_(part.group["eps"])).reciprocal_().mul_(state["s"]).mul_(gradient)
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=step_size * (1 - beta1))
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        state["s"].mul_(root).add_(gradient, alpha=step_size * (1 - root))
        return _sums(along, state["s"].abs())

    def learn(
        self, scalars: Scalars, numbers: Scalars, sums: list[float], group: Mapping[str, Any]
    ) -> tuple[Scalars, Scalars]:
        (along, size), root, d = sums, numbers["root"], scalars["d"]
        numerator = root * scalars["d_numerator"] + (1 - root) * numbers["step_size"] * along
        if size > 0 and group["lr"] > 0:
            found = group["d_coef"] * numerator / ((1 - root) * size)
            d = max(d, min(found, d * group["growth_rate"]))
        return {"d": d, "d_numerator": numerator}, numbers

    def update(self, part: Part) -> None:
        bound = part.state["exp_avg_sq"].sqrt().add_(part.group["eps"])
        part.decay(part.numbers["step_size"])
        part.weight.addcdiv_(part.state["exp_avg"], bound, value=-1.0)

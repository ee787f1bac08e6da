"""Kinds whose elements do not know of one another: Lion, ADOPT, AdamW without a schedule."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trainer.optim.kinds.rule import Part, Rule, Scalars, StateTensor, adam_state


class Lion(Rule):
    """The sign of an interpolation between momentum and gradient (Chen et al. 2023, algorithm 2)."""

    kind = "lion"

    def tensors(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, StateTensor]:
        return {"exp_avg": StateTensor(shape)}

    def update(self, part: Part) -> None:
        (beta1, beta2), moment = part.group["betas"], part.state["exp_avg"]
        direction = moment.lerp(part.gradient, 1 - beta1).sign_()
        moment.lerp_(part.gradient, 1 - beta2)
        part.decay()
        part.weight.sub_(direction, alpha=part.lr)


class Lion8Bit(Lion):
    """Lion whose momentum is kept in blocks of 8 bits."""

    kind = "lion_8bit"


class Adopt(Rule):
    """Adam whose second moment is that of the step before, and whose update is clipped (Taniguchi et al. 2024).

    Algorithm 2, with the clipping of their section 5: at step t elements of g / v beyond t^(1/4) are cut. The first
    step only begins the second moment.
    """

    kind = "adopt"

    def tensors(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, StateTensor]:
        return adam_state(shape)

    def update(self, part: Part) -> None:
        (beta1, beta2), gradient = part.group["betas"], part.gradient
        first, second = part.state["exp_avg"], part.state["exp_avg_sq"]
        if part.step == 1:
            second.copy_(gradient.square())
            return
        bound = (part.step - 1) ** 0.25
        normed = (gradient / second.sqrt().clamp_(min=part.group["eps"])).clamp_(-bound, bound)
        first.lerp_(normed, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        part.decay()
        part.weight.sub_(first, alpha=part.lr)


class ScheduleFreeAdamW(Rule):
    """AdamW at a constant learning rate, and an average of its weights (Defazio et al. 2024, algorithm 1).

    The model holds y, at which gradients are taken; `z` goes AdamW's way, and the average x = y + (1 - 1/beta1)(z - y)
    is what is validated and published (`trainer.optim.kinds.schedule_free`). Weights count in it by the square of the
    highest learning rate so far, so that a warm-up counts less.
    """

    kind = "schedule_free_adamw"

    def tensors(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, StateTensor]:
        return {"z": StateTensor(shape), "exp_avg_sq": StateTensor(shape, signed=False)}

    def scalars(self, group: Mapping[str, Any]) -> Scalars:
        return {"weight_sum": 0.0, "lr_max": 0.0}

    def fill(self, state: Mapping[str, Tensor], weight: Tensor) -> None:
        state["z"].copy_(weight)

    def begin(self, scalars: Scalars, group: Mapping[str, Any], step: int) -> tuple[Scalars, Scalars]:
        lr_max = max(scalars["lr_max"], group["lr"])
        weight_sum = scalars["weight_sum"] + lr_max**2
        share = lr_max**2 / weight_sum if weight_sum else 0.0
        return {"weight_sum": weight_sum, "lr_max": lr_max}, {"share": share}

    def update(self, part: Part) -> None:
        (beta1, beta2), share, gradient = part.group["betas"], part.numbers["share"], part.gradient
        second, z = part.state["exp_avg_sq"], part.state["z"]
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        normed = gradient.div_((second / (1 - beta2**part.step)).sqrt_().add_(part.group["eps"]))
        normed.add_(part.weight, alpha=part.group["weight_decay"])
        part.weight.lerp_(z, share).add_(normed, alpha=part.lr * (beta1 * (1 - share) - 1))
        z.sub_(normed, alpha=part.lr)

"""Kinds whose updates hang on a whole tensor: AdamW with clipped updates, and moments of rows and columns.

Rows may lie on several workers, so that every sum over rows is yielded to be completed; see `rule.Sums`.
"""

from collections.abc import Generator

import torch
from torch import Tensor

from trainer.optim.kinds.rule import Part, Rule, StateTensor, Sums, adam_state, as_matrix, is_matrix


class StableAdamW(Rule):
    """AdamW whose learning rate falls where a gradient is larger than its second moment says (Wortsman et al. 2023).

    Algorithm 2: bias corrections within the decay rates, and the update of each tensor divided by the root mean square
    of gradient / root of second moment where that is above 1.
    """

    kind = "stable_adamw"
    in_chunks = False
    scratch_bytes = 16

    def tensors(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, StateTensor]:
        return adam_state(shape)

    def updates(self, part: Part) -> Sums:
        eps, gradient, first, second = part.group["eps"], part.gradient, part.state["exp_avg"], part.state["exp_avg_sq"]
        beta1, beta2 = (_debiased(beta, part.step) for beta in part.group["betas"])
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        ratios = gradient.square_().div_(second.clamp(min=eps**2))
        rms = _root_mean((yield ratios.sum(dtype=torch.float64)), part)
        step_size = part.lr / rms.clamp(min=1.0)
        part.weight.mul_(1 - step_size * part.group["weight_decay"])
        torch.sqrt(second, out=gradient)
        part.weight.sub_(torch.div(first, gradient.add_(eps), out=gradient).mul_(step_size))


class Adafactor(Rule):
    """Second moments of rows and columns in place of elements, and no first one (Shazeer and Stern 2018, algorithm 4).

    The learning rate is the run's and not their `min(0.01, 1 / sqrt(t))`. Convolutions count as matrices of one row
    for each filter.
    """

    kind = "adafactor"
    in_chunks = False
    scratch_bytes = 16

    def tensors(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, StateTensor]:
        return _second_moment("exp_avg_sq", shape)

    def updates(self, part: Part) -> Sums:
        group, gradient = part.group, part.gradient
        beta2 = 1 - part.step ** -group["decay_rate"]
        size = torch.ones((), device=gradient.device)
        if group["scale_by_weights"]:
            squares = yield part.weight.square().sum(dtype=torch.float64)
            size = _root_mean(squares, part).clamp(min=group["eps2"])
        rms = yield from _normalize(part, beta2)
        part.decay()
        part.weight.sub_(gradient.mul_(part.lr * size / (rms / group["clip_threshold"]).clamp(min=1.0)))


class Came(Rule):
    """Adafactor with a first moment, which counts less where it differs from the update (Luo et al. 2023, algorithm 2).

    Both the second moment and that instability are kept by rows and columns; vectors have the second moment alone.
    """

    kind = "came"
    in_chunks = False
    scratch_bytes = 16

    def tensors(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, StateTensor]:
        found = {"exp_avg": StateTensor(shape)} | _second_moment("exp_avg_sq", shape)
        return found | (_second_moment("exp_avg_res", shape) if is_matrix(shape) else {})

    def updates(self, part: Part) -> Sums:
        group, gradient, first = part.group, part.gradient, part.state["exp_avg"]
        beta1, beta2 = group["betas"]
        rms = yield from _normalize(part, beta2)
        gradient.div_((rms / group["clip_threshold"]).clamp(min=1.0))
        first.lerp_(gradient, 1 - beta1)
        change = first
        if is_matrix(part.shape):
            instability = gradient.sub_(first).square_().add_(group["eps2"])
            scales = yield from _moment_scales("exp_avg_res", part, instability, group["beta3"])
            change = torch.mul(first, scales[0], out=gradient).mul_(scales[1])
        part.decay()
        part.weight.sub_(change, alpha=part.lr)


def _debiased(beta: float, step: int) -> float:
    """The decay rate that makes of a moment its bias-corrected self."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)


def _root_mean(squares: Tensor, part: Part) -> Tensor:
    """fp32 scalar, of the sum of squares over the whole parameter."""
    return (squares / max(torch.Size(part.shape).numel(), 1)).sqrt().float()


def _second_moment(name: str, shape: tuple[int, ...]) -> dict[str, StateTensor]:
    """Of rows and columns; of a vector, whole."""
    if not is_matrix(shape):
        return {name: StateTensor(shape)}
    rows, columns = as_matrix(shape)
    return {f"{name}_row": StateTensor((rows,)), f"{name}_col": StateTensor((columns,), by_rows=False)}


def _normalize(part: Part, beta2: float) -> Generator[Tensor, Tensor, Tensor]:
    """Divide the gradient by the root of its second moment, in place; gives the root mean square of the result."""
    gradient = part.gradient
    squares = gradient.square().add_(part.group["eps"])
    scales = yield from _moment_scales("exp_avg_sq", part, squares, beta2)
    del squares
    for scale in scales:
        gradient.mul_(scale)
    return _root_mean((yield gradient.square().sum(dtype=torch.float64)), part)


def _moment_scales(
    name: str, part: Part, squares: Tensor, beta: float
) -> Generator[Tensor, Tensor, tuple[Tensor, ...]]:
    """Take `squares` [rows, columns] into a moment; return what divides by the moment's root: factors of a product."""
    if name in part.state:
        part.state[name].mul_(beta).add_(squares, alpha=1 - beta)
        return (part.state[name].rsqrt(),)
    (rows, _), by_row, by_column = as_matrix(part.shape), part.state[f"{name}_row"], part.state[f"{name}_col"]
    by_row.mul_(beta).add_(squares.mean(dim=1), alpha=1 - beta)
    sums = yield torch.cat([squares.sum(dim=0), by_row.sum().view(1)])
    by_column.mul_(beta).add_(sums[:-1] / rows, alpha=1 - beta)
    return (by_row * (rows / sums[-1])).rsqrt_().unsqueeze(1), by_column.rsqrt()

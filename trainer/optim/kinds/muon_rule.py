"""Muon: the momentum of a matrix made orthogonal, and AdamW for what is no hidden matrix."""

import re
from math import sqrt

import torch
from torch import Tensor

from trainer.optim.kinds.rule import Part, Rule, StateTensor, Sums, adam_state, as_matrix, is_matrix

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Jordan's coefficients: five iterations bring singular values near 1."""
_SMALLEST_NORM = 1e-7
_FIRST_AND_LAST = re.compile(r"(^|\.)(conv_in|conv_out|time_embedding|add_embedding|embeddings|text_projection)\.")


def goes_by_muon(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a hidden matrix or a set of filters; not embeddings, first and last layers, vectors."""
    return is_matrix(shape) and not _FIRST_AND_LAST.search(f"{name}.")


class Muon(Rule):
    """Jordan et al. 2024; learning rates and weight decay as by Liu et al. 2025, "Muon is scalable for LLM training".

    Every worker computes the orthogonal update of each whole matrix and takes its rows of it; rows that are spread
    are put together first. On a card both are in bf16, as in their code; on the CPU, which is slow with it, in fp32.
    """

    kind = "muon"
    in_chunks = False
    scratch_bytes = 8
    whole_bytes = 16

    def tensors(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, StateTensor]:
        return {"momentum": StateTensor(shape)} if goes_by_muon(name, shape) else adam_state(shape)

    def updates(self, part: Part) -> Sums:
        if "momentum" not in part.state:
            _adamw(part)
            return
        group, gradient, momentum = part.group, part.gradient, part.state["momentum"]
        momentum.lerp_(gradient, 1 - group["momentum"])
        towards = gradient.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
        (rows, columns), last = as_matrix(part.shape), part.first_row + len(gradient)
        whole = towards.to(torch.bfloat16) if towards.is_cuda else towards
        if len(gradient) < rows:
            padded = torch.zeros(rows, columns, dtype=whole.dtype, device=whole.device)
            padded[part.first_row : last] = whole
            whole = yield padded  # zeros and one number add up exactly
        direction = orthogonal(whole, group["ns_steps"])[part.first_row : last]
        scale = sqrt(max(1, rows / columns)) if group["lr_scale"] == "original" else 0.2 * sqrt(max(rows, columns))
        part.decay()
        part.weight.add_(direction, alpha=-part.lr * scale)


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """Nearly the orthogonal factor of a matrix, by Newton and Schulz's iteration in its own dtype."""
    a, b, c = NEWTON_SCHULZ
    found = matrix.T if len(matrix) > matrix.shape[1] else matrix
    found = found / found.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = found @ found.T
        found = torch.addmm(found, torch.addmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return found.T if len(matrix) > matrix.shape[1] else found


def _adamw(part: Part) -> None:
    (beta1, beta2), gradient = part.group["betas"], part.gradient
    first, second = part.state["exp_avg"], part.state["exp_avg_sq"]
    first.lerp_(gradient, 1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    bound = (second / (1 - beta2**part.step)).sqrt_().add_(part.group["eps"])
    part.decay()
    part.weight.addcdiv_(first, bound, value=-part.lr / (1 - beta1**part.step))

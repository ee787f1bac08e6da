"""Adaptive gradient clipping: each unit's gradient against its own weights."""

from collections.abc import Iterable

import torch
from torch import nn

from trainer.parallel.sharding import local_tensor

_LEAST_NORM = 1e-3  # of weights, so that units that begin at zero can move (Brock et al. 2021, section 4)


@torch.no_grad()
def clip_units(parameters: Iterable[nn.Parameter], limit: float, loss_scale: float) -> None:
    """Scale the gradient of each unit down to `limit` times the norm of its weights (Brock et al. 2021, eq. 3).

    A unit is a row of a matrix or a filter of a convolution; biases and norms are left as they are. Of a spread model
    each worker has whole rows, so nothing has to be exchanged.

    Args:
        parameters: with their gradients, those of the loss times `loss_scale`; changed in place.
        limit: such as 0.01.
    """
    for parameter in parameters:
        if parameter.grad is None or parameter.dim() < 2:
            continue
        weights, gradient = local_tensor(parameter.detach()), local_tensor(parameter.grad)
        axes = list(range(1, gradient.dim()))
        most = torch.linalg.vector_norm(weights, dim=axes, keepdim=True, dtype=torch.float32).clamp(min=_LEAST_NORM)
        norm = torch.linalg.vector_norm(gradient, dim=axes, keepdim=True, dtype=torch.float32)
        share = (most * (limit * loss_scale) / norm.clamp(min=1e-30)).clamp(max=1.0)
        gradient.mul_(share.to(gradient.dtype))

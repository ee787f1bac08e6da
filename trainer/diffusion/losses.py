"""From a prediction and its target to one number per sample, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from trainer.diffusion.prediction import Mixture

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Of prediction, target [B, c, h, w] and the delta of Huber's losses [B, 1, 1, 1], for each element: [B, c, h, w]."""
Delta = Callable[[Mixture], Tensor]
"""Delta of each sample, [B] float32 on the CPU."""


def squared(prediction: Tensor, target: Tensor, delta: Tensor | None) -> Tensor:
    """L2: (p - t)^2."""
    return (prediction.float() - target.float()).square()


def absolute(prediction: Tensor, target: Tensor, delta: Tensor | None) -> Tensor:
    """L1: |p - t|."""
    return (prediction.float() - target.float()).abs()


def huber(prediction: Tensor, target: Tensor, delta: Tensor | None) -> Tensor:
    """2 d (sqrt((p - t)^2 + d^2) - d): L2 of small errors, 2 d times L1 of large ones (pseudo-Huber)."""
    assert delta is not None
    return delta * smooth_l1(prediction, target, delta)


def smooth_l1(prediction: Tensor, target: Tensor, delta: Tensor | None) -> Tensor:
    """2 (sqrt((p - t)^2 + d^2) - d): L1 of large errors, twice (pseudo-Huber, over d)."""
    assert delta is not None
    difference = prediction.float() - target.float()
    return 2 * ((difference.square() + delta.square()).sqrt() - delta)


def constant_delta(delta: float) -> Delta:
    """The same at all noise levels."""
    return lambda mixture: torch.full_like(mixture.input_signal, delta, device="cpu")


def exponential_delta(delta: float) -> Delta:
    """From 1 at the image down to `delta` at the noise: delta^position (sd-scripts' `exponential`)."""
    return lambda mixture: torch.exp(math.log(delta) * mixture.positions).float()


def snr_delta(delta: float) -> Delta:
    """(1 - delta) / (1 + sigma)^2 + delta with sigma = 1 / sqrt(SNR) (sd-scripts' `snr`)."""

    def deltas(mixture: Mixture) -> Tensor:
        share = mixture.signal / (mixture.signal + mixture.noise)  # 1 / (1 + sigma), and 0 where no signal is left
        return ((1 - delta) * share**2 + delta).float()

    return deltas

"""How much each sample counts, by its noise level; finite wherever the prediction is defined.

Papers give weights for one prediction. Written for the error of x0 they are the same function for all: a weight w on
that error is w * (error of x0 / error of the target)^2 on the target's, which `Mixture.error` gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.diffusion.prediction import Mixture

Weighting = Callable[[Mixture], Tensor]
"""[B] float64 on the CPU, for the loss of the target."""


def unweighted(mixture: Mixture) -> Tensor:
    """1: the plain loss of what is predicted."""
    return torch.ones_like(mixture.signal)


def min_snr(gamma: float) -> Weighting:
    """min(SNR, gamma) on x0 (Hang et al. 2023, arXiv 2303.09556): min(1, gamma / SNR) on epsilon, /(SNR + 1) on v."""

    def weigh(mixture: Mixture) -> Tensor:
        signal, noise = mixture.signal**2, mixture.noise**2
        return torch.minimum(signal, gamma * noise) * _relative_error(mixture)

    return weigh


def soft_min_snr(gamma: float) -> Weighting:
    """SNR gamma / (SNR + gamma) on x0, min-SNR's smooth form (Crowson et al. 2024, arXiv 2401.11605, section 4)."""

    def weigh(mixture: Mixture) -> Tensor:
        signal, noise = mixture.signal**2, mixture.noise**2
        return gamma * signal * noise / (signal + gamma * noise) * _relative_error(mixture)

    return weigh


def debiased(mixture: Mixture) -> Tensor:
    """1 / sqrt(SNR) on epsilon, so sqrt(SNR) on x0 (Yu et al. 2023, arXiv 2310.08442, eq. 14)."""
    return mixture.signal * mixture.noise * _relative_error(mixture)


def p2(k: float, gamma: float) -> Weighting:
    """1 / (k + SNR)^gamma on epsilon, so SNR / (k + SNR)^gamma on x0 (Choi et al. 2022, arXiv 2204.00227, eq. 8)."""

    def weigh(mixture: Mixture) -> Tensor:
        signal, noise = mixture.signal**2, mixture.noise**2
        return signal * (noise / (k * noise + signal)) ** gamma * _relative_error(mixture)

    return weigh


def like_epsilon(mixture: Mixture) -> Tensor:
    """As if epsilon had been predicted: SNR on x0, so SNR / (SNR + 1) on v (sd-scripts: like noise prediction)."""
    return mixture.signal**2 * _relative_error(mixture)


def like_v(mixture: Mixture) -> Tensor:
    """As if v had been predicted: SNR + 1 on x0, so (SNR + 1) / SNR on epsilon."""
    return (mixture.signal**2 + mixture.noise**2) * _relative_error(mixture)


def like_flow(mixture: Mixture) -> Tensor:
    """As if the velocity of flow matching had been predicted: (1 + sqrt(SNR))^2 on x0."""
    return (mixture.signal + mixture.noise) ** 2 * _relative_error(mixture)


def _relative_error(mixture: Mixture) -> Tensor:
    """(error of x0 / error of the target)^2 / noise^2: with the SNR's denominator, for it may be 0."""
    return (mixture.error / mixture.noise) ** 2

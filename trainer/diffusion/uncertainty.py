"""Weights of noise levels that are learnt beside the model (Karras et al. 2024, EDM2, arXiv 2312.02696, eq. 15)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.diffusion.learner import Seen
from trainer.diffusion.prediction import Mixture

FEATURES = 128
_BETAS, _EPS = (0.9, 0.99), 1e-8
_MOST_LOG_SNR = 40.0  # beyond, at both ends of a schedule, the noise level is the same to the model


class LearnedWeights:
    """The loss L of an image becomes exp(-u) L + u, where u(ln SNR) follows ln E[L] and makes all levels count alike.

    u is one linear layer on `FEATURES` random Fourier features of ln(sigma) / 4, as in EDM2, but begins with 0, so that
    the first steps are as without it. It is fitted by Adam on the CPU, in float64 and in closed form: of an image,
    du = 1 - exp(-u) L.
    """

    name = "learned_weights"
    corrects = False

    def __init__(self, lr: float = 0.01) -> None:
        self._lr, self._steps = lr, 0
        generator = torch.Generator().manual_seed(0)
        self._frequencies = torch.randn(FEATURES, generator=generator, dtype=torch.float64)
        self._phases = torch.rand(FEATURES, generator=generator, dtype=torch.float64)
        self._layer, self._mean, self._square = (torch.zeros(FEATURES, dtype=torch.float64) for _ in range(3))

    def log_loss(self, log_snr: Tensor) -> Tensor:
        """u of noise levels, [B] float64 both."""
        return self._features(log_snr) @ self._layer

    def factors(self, mixture: Mixture) -> Tensor:
        return torch.exp(-self.log_loss(mixture.log_snr))

    def sums(self, seen: Seen) -> list[float]:
        """The gradient of the layer, and how many images it is of."""
        there = (seen.weights > 0).double()
        slopes = there * (1 - torch.exp(-self.log_loss(seen.log_snr)) * seen.losses)
        return [*(slopes @ self._features(seen.log_snr)).tolist(), float(there.sum())]

    def learn(self, sums: Sequence[float]) -> None:
        *total, images = sums
        gradient = torch.tensor(total, dtype=torch.float64) / images
        self._steps += 1
        self._mean = self._mean + (1 - _BETAS[0]) * (gradient - self._mean)
        self._square = self._square + (1 - _BETAS[1]) * (gradient**2 - self._square)
        mean, square = (
            moment / (1 - beta**self._steps) for moment, beta in zip((self._mean, self._square), _BETAS, strict=True)
        )
        self._layer = self._layer - self._lr * mean / (square.sqrt() + _EPS)

    def record(self) -> dict[str, Any]:
        tensors = {"frequencies": self._frequencies, "phases": self._phases, "layer": self._layer}
        tensors |= {"mean": self._mean, "square": self._square}
        return {"steps": self._steps} | {name: tensor.tolist() for name, tensor in tensors.items()}

    def take_up(self, record: Mapping[str, Any]) -> None:
        names = ("frequencies", "phases", "layer", "mean", "square")
        found = [torch.tensor(record.get(name, ()), dtype=torch.float64) for name in names]
        if any(len(tensor) != FEATURES for tensor in found):
            raise ValueError(f"{[len(tensor) for tensor in found]} numbers in place of {FEATURES} each")
        self._frequencies, self._phases, self._layer, self._mean, self._square = found
        self._steps = int(record["steps"])

    def _features(self, log_snr: Tensor) -> Tensor:
        told = -log_snr.clamp(-_MOST_LOG_SNR, _MOST_LOG_SNR) / 8  # ln(sigma) / 4, as EDM tells it to the network
        waves = torch.cos(2 * math.pi * (told[:, None] * self._frequencies + self._phases))
        return math.sqrt(2 / FEATURES) * waves

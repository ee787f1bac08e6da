"""Timesteps by importance: the more often, the larger their loss has been (Nichol and Dhariwal 2021, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.diffusion.learner import Seen
from trainer.diffusion.prediction import Mixture
from trainer.diffusion.timesteps import by_weights

BINS = 100
_ENOUGH = 10  # images of each bin, before which all bins are alike
_HISTORY = 100  # images that the running mean of a bin looks back on


class LossHistory:
    """Positions p with density sqrt(E[L_p^2]) and losses divided by it, so that the expected gradient stays the same.

    That density is the one with the least variance (arXiv 2102.09672, eq. 18). E[L_p^2] is a running mean in each of
    `BINS` equal parts of [low, high), over all workers' images; until each part has seen enough, positions are even.
    """

    name = "loss_history"
    corrects = True

    def __init__(self, even_share: float = 0.01, low: float = 0.0, high: float = 1.0) -> None:
        """`even_share` of the positions are even whatever the losses, so that no part is forgotten."""
        self._even_share, self._low, self._high = even_share, low, high
        self._squares = torch.zeros(BINS, dtype=torch.float64)
        self._counts = torch.zeros(BINS, dtype=torch.float64)
        self._draw = by_weights(self.density())

    def density(self) -> Tensor:
        """Of each part, relative to even: [BINS] float64, 1 on average."""
        even = torch.ones(BINS, dtype=torch.float64)
        if self._counts.min() < _ENOUGH or not self._squares.any():
            return even
        roots = self._squares.sqrt()
        return self._even_share * even + (1 - self._even_share) * roots / roots.mean()

    def positions(self, uniforms: Tensor) -> Tensor:
        """A `Distribution`: from uniform numbers [B] float64 to positions [B] float64 in [low, high)."""
        return self._low + (self._high - self._low) * self._draw(uniforms)

    def factors(self, mixture: Mixture) -> Tensor:
        return 1 / self.density()[self._bins(mixture.positions)]

    def sums(self, seen: Seen) -> list[float]:
        """Images and squared losses of each part."""
        there = seen.weights > 0
        bins, squares = self._bins(seen.positions[there]), seen.losses[there] ** 2
        counts = torch.bincount(bins, minlength=BINS).double()
        return [*counts.tolist(), *torch.bincount(bins, squares, minlength=BINS).tolist()]

    def learn(self, sums: Sequence[float]) -> None:
        counts, squares = torch.tensor(sums, dtype=torch.float64).view(2, BINS)
        means = squares / counts.clamp(min=1)
        before, self._counts = self._counts, self._counts + counts
        # The plain mean at first, then one that forgets, by as many images as there were.
        forgets = 1 - (1 - 1 / _HISTORY) ** counts
        rate = torch.where(self._counts <= _HISTORY, counts / (before + counts).clamp(min=1), forgets)
        self._squares = self._squares + rate * (means - self._squares)
        self._draw = by_weights(self.density())

    def record(self) -> dict[str, Any]:
        return {"squares": self._squares.tolist(), "counts": self._counts.tolist()}

    def take_up(self, record: Mapping[str, Any]) -> None:
        squares, counts = (torch.tensor(record.get(name, ()), dtype=torch.float64) for name in ("squares", "counts"))
        if len(squares) != BINS or len(counts) != BINS:
            raise ValueError(f"{len(squares)} parts in place of {BINS}")
        self._squares, self._counts = squares, counts
        self._draw = by_weights(self.density())

    def _bins(self, positions: Tensor) -> Tensor:
        return ((positions - self._low) / (self._high - self._low) * BINS).long().clamp(0, BINS - 1)

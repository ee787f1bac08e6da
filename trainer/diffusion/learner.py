"""What an objective learns from the losses that it sees: where to train more often, or what a noise level is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.diffusion.prediction import Mixture


@dataclass(frozen=True, eq=False)
class Seen:
    """One worker's images of a step: where they were trained, and what came of it; all [n] float64 on the CPU.

    Attributes:
        positions: in [0, 1).
        log_snr: ln(SNR).
        losses: before the learner's own factor.
        weights: 0 for padding and for rows that could not be read.
    """

    positions: Tensor
    log_snr: Tensor
    losses: Tensor
    weights: Tensor


class Learner(Protocol):
    """Changes between steps alone, in the same way on every worker, so that the cut of a step does not matter."""

    name: str
    """Key of its state in a checkpoint's record."""
    corrects: bool
    """Whether its factor belongs to the loss that is told: it undoes how often a position is trained. Weights that are
    learnt do not: with them, the loss of every noise level is about 1, all the time."""

    def factors(self, mixture: Mixture) -> Tensor:
        """What each image's loss is multiplied by: [B] float64 on the CPU, above 0."""
        ...

    def sums(self, seen: Seen) -> list[float]:
        """What is added up over the workers; always as many numbers."""
        ...

    def learn(self, sums: Sequence[float]) -> None:
        """Take in a step, by the sums over all workers. Not called for a step that changed nothing."""
        ...

    def record(self) -> dict[str, Any]:
        """The state as JSON can say it, to the bit."""
        ...

    def take_up(self, record: Mapping[str, Any]) -> None:
        """Go on from a state.

        Raises:
            ValueError: it is of another kind.
        """
        ...


def seen_by(
    mixtures: Sequence[Mixture], weights: Sequence[Tensor], factored: Sequence[float], learner: Learner
) -> Seen:
    """A step's images, of its micro-batches.

    Args:
        weights: [B] of each micro-batch, on the CPU.
        factored: the losses of all of them with the learner's factor in, in their order.
    """
    factors = torch.cat([learner.factors(mixture) for mixture in mixtures])
    return Seen(
        positions=torch.cat([mixture.positions for mixture in mixtures]),
        log_snr=torch.cat([mixture.log_snr for mixture in mixtures]),
        losses=torch.tensor(factored, dtype=torch.float64) / factors,
        weights=torch.cat([weight.double() for weight in weights]),
    )

"""Training loss by timestep: where in the process the loss of a run falls, and where it does not.

The process is cut into eight parts of the same length; of a schedule of 1,000 timesteps, part i is timesteps 125 i to
125 i + 124. Timesteps are drawn anew for each image, so that the mean of a part is taken over many of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

PARTS = 8
KIND = "train_by_timestep"
_FIRST = [1000 * part // PARTS for part in range(PARTS)]  # timestep of each part
_LEAST_IMAGES = 400  # of a record: some fifty a part, where all timesteps are drawn alike


def sums_by_timestep(positions: Sequence[Tensor], losses: Tensor, weights: Tensor, counts: Tensor) -> list[float]:
    """One worker's sums over a step: of each part the loss, and then of each part the images.

    Args:
        positions: in [0, 1), float64 on the CPU, of each micro-batch.
        losses: [n] float64 on the CPU, of all of them.
        weights: [n], that losses are multiplied by.
        counts: [n]; 0 for padding and for rows that could not be read, else 1.
    """
    part = np.concatenate([(each.numpy() * PARTS).astype(np.int64) for each in positions])
    counted, weighted = counts.double().numpy(), weights.double().numpy()
    # A row that does not count may have any loss.
    told = np.where(weighted != 0, losses.numpy() * weighted, 0.0)
    return [*np.bincount(part, told, PARTS).tolist(), *np.bincount(part, counted, PARTS).tolist()]


class TimestepLosses:
    """Sums over steps, until they are worth a record."""

    def __init__(self) -> None:
        self._sums = np.zeros((2, PARTS))

    def add(self, sums: Sequence[float]) -> None:
        """A step's, over all workers, as `sums_by_timestep` gives them; of one whose loss is not finite, nothing."""
        if len(sums) == 2 * PARTS and all(map(math.isfinite, sums)):
            self._sums += np.array(sums).reshape(2, PARTS)

    def take(self) -> dict[str, float]:
        """A record of enough images, with which the sums begin anew: `loss_t0`, the mean loss of a part with images,
        and `images_t0`, how many it has; `loss_t125`, ... Empty as long as there are too few."""
        losses, images = self._sums
        if images.sum() < _LEAST_IMAGES:
            return {}
        self._sums = np.zeros((2, PARTS))
        there = [part for part in range(PARTS) if images[part]]
        means = {f"loss_t{_FIRST[part]}": float(losses[part] / images[part]) for part in there}
        return means | {f"images_t{_FIRST[part]}": float(images[part]) for part in there}

"""How much of a shard's images is trained, by their masks."""

from typing import NamedTuple

import numpy as np

from trainer.data.masks import FULL


class MaskCounts(NamedTuple):
    """Of a number of images how many are not trained as a whole, and the mean of the trained shares of all."""

    images: int
    masked: int
    trained: float

    def __str__(self) -> str:
        trained = f"{100 * self.trained:.3g} % of the area of all is trained"
        return f"masks: {self.masked:,} of {self.images:,} images are trained in part; {trained}"


def mask_counts(masks: np.ndarray) -> MaskCounts:
    """Of masks u8 [n, h, w]."""
    if not len(masks):
        return MaskCounts(0, 0, 1.0)
    masked = masks.reshape(len(masks), -1).min(axis=1) < FULL
    return MaskCounts(len(masks), int(masked.sum()), float(masks.mean()) / FULL)

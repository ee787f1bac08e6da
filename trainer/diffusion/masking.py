"""From the losses of a sample's elements to one number, by a mask of where they count."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Mean = Callable[[Tensor, "Tensor | None"], Tensor]
"""Of the elements' losses [B, c, h, w] and the samples' masks [B, h, w] uint8, on any device: [B]."""

_FULL = 255


def plain_mean(losses: Tensor, masks: Tensor | None) -> Tensor:
    """Every element counts alike."""
    return losses.flatten(1).mean(dim=1)


def masked_mean(unmasked_weight: float = 0.0) -> Mean:
    """mean(w l) over all elements, with w = u + (1 - u) m: a sample counts as much as is trained of it.

    Args:
        unmasked_weight: u, what counts where the mask m, 0..1, is 0.
    """

    def mean(losses: Tensor, masks: Tensor | None) -> Tensor:
        return (_weights(losses, masks, unmasked_weight) * losses).flatten(1).mean(dim=1)

    return mean


def area_mean(unmasked_weight: float = 0.0) -> Mean:
    """sum(w l) / sum(w): the mean over what is trained, so that a small area counts as much as a large one.

    A mask that is 0 everywhere gives 0.
    """

    def mean(losses: Tensor, masks: Tensor | None) -> Tensor:
        weights = _weights(losses, masks, unmasked_weight)
        area = weights.flatten(1).sum(dim=1) * losses.shape[1]
        return (weights * losses).flatten(1).sum(dim=1) / area.clamp(min=1 / _FULL)  # less only where it is 0

    return mean


def _weights(losses: Tensor, masks: Tensor | None, unmasked_weight: float) -> Tensor:
    """[B, 1, h, w] float32."""
    assert masks is not None, "a masked loss needs masks"
    inside = masks.to(losses.device, non_blocking=True).unsqueeze(1).float() / _FULL
    return unmasked_weight + (1 - unmasked_weight) * inside

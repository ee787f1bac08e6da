"""Masks: how much each place of an image is trained, 255 in full, 0 not at all; kept at the size of the latents.

A mask belongs to the image as it is displayed. It goes through the image's own crop and mirroring, and each latent gets
the mean of the mask over the area that it stands for.
"""

import numpy as np

from trainer.data.augment import View
from trainer.data.buckets import source_box

FULL = 255
_TOLERANCE_PX = 1.0
_VALUES_AT_ONCE = 1 << 20


class BadMask(Exception):
    """An image's mask cannot be used; the message says why."""


def check_mask_shape(mask_hw: tuple[int, int], image_hw: tuple[int, int]) -> None:
    """Raises BadMask where the aspect ratios differ by more than the rounding of a resize explains."""
    (mask_h, mask_w), (image_h, image_w) = mask_hw, image_hw
    if abs(mask_h - image_h * mask_w / image_w) > _TOLERANCE_PX < abs(mask_w - image_w * mask_h / image_h):
        raise BadMask(f"its mask is {mask_w}x{mask_h} px, no size of the image as displayed, {image_w}x{image_h} px")


def fill_mask(values: np.ndarray, image_hw: tuple[int, int], view: View, mask: np.ndarray) -> None:
    """From a whole mask to that of a view.

    Args:
        values: u8 [H, W], over the image as displayed, of any size.
        mask: u8 [bucket height / 8, bucket width / 8], filled with means over area, rounded.
    """
    top, left, bottom, right = source_box(image_hw, view.placement)
    scale_y, scale_x = values.shape[0] / image_hw[0], values.shape[1] / image_hw[1]
    rows = np.linspace(top * scale_y, bottom * scale_y, mask.shape[0] + 1)
    columns = np.linspace(left * scale_x, right * scale_x, mask.shape[1] + 1)
    means = _means_between(_means_between(values, rows).T, columns).T
    np.copyto(mask, np.rint(means[:, ::-1] if view.flipped else means), casting="unsafe")


def fill_stored_mask(values: np.ndarray, mirrored: bool, mask: np.ndarray) -> None:
    """The same from the `alpha_mask` of an `.npz`, which has been cropped: 0..1, at the size of pixels or of latents.

    Args:
        values: floats or bool [h, w] or [8h, 8w].
        mask: u8 [h, w].

    Raises:
        BadMask: it has another shape, or values beyond 0..1.
    """
    height, width = mask.shape
    if values.shape not in ((height, width), (8 * height, 8 * width)):
        raise BadMask(f"alpha_mask of shape {list(values.shape)}, but its latents are {height} x {width}")
    means = values.astype(np.float32).reshape(height, values.shape[0] // height, width, -1).mean(axis=(1, 3))
    if not (means >= 0).all() or not (means <= 1).all():
        raise BadMask("alpha_mask with values beyond 0..1")
    np.copyto(mask, np.rint(FULL * (means[:, ::-1] if mirrored else means)), casting="unsafe")


def _means_between(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Means of [n, m] over the intervals between ascending `edges` in 0..n, [len(edges) - 1, m] float64; a row that an
    edge cuts counts by its share."""
    rows = np.minimum(edges.astype(np.int64), len(values) - 1)
    sums = np.empty((len(rows) - 1, values.shape[1]))
    width = max(1, _VALUES_AT_ONCE // len(values))
    for left in range(0, values.shape[1], width):  # which is cast to float64 for the sum
        part = values[:, left : left + width]
        sums[:, left : left + width] = np.add.reduceat(part, rows, axis=0, dtype=np.float64)[:-1]
    sums[rows[1:] == rows[:-1]] = 0  # reduceat gives the row itself where the interval lies within one
    return (sums + np.diff((edges - rows)[:, None] * values[rows], axis=0)) / np.diff(edges)[:, None]

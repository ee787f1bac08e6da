"""How one visit of training sees an image that is decoded anew each time: where the crop lies, and whether mirrored.

Both follow from the visit's own seed, so that a resumed run, on any number of workers, sees the same pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from trainer.data.buckets import Placement
from trainer.keyed import draw_seed, draw_uniform


@dataclass(frozen=True)
class Augmentation:
    """What is drawn anew for each visit; the fields of `data.augment` in the configuration."""

    flip_probability: float = 0.0
    random_crop: bool = False


NOT_AUGMENTED = Augmentation()


@dataclass(frozen=True)
class View:
    """What one visit sees: `placement` in the image as it lies in the file, mirrored afterwards where `flipped`."""

    placement: Placement
    flipped: bool


ChooseView = Callable[[str, int, Placement], View]
"""(key, repeat, placement at the centre) -> the view of this visit."""


def centred_view(key: str, repeat: int, centred: Placement) -> View:
    """The same view at every visit: the centre, as it lies in the file."""
    return View(centred, False)


def draw_view(centred: Placement, augmentation: Augmentation, seed: int) -> View:
    """The view of the visit whose seed is `seed`; without augmentation it is `centred` itself.

    A random crop is uniform over all places of the bucket within the resized image.
    """
    placement = centred
    if augmentation.random_crop:
        spare_h = centred.resized_hw[0] - centred.bucket.height_px
        spare_w = centred.resized_hw[1] - centred.bucket.width_px
        top, left = draw_seed(seed, "crop top") % (spare_h + 1), draw_seed(seed, "crop left") % (spare_w + 1)
        placement = replace(centred, crop_top_left=(top, left))
    return View(placement, draw_uniform(seed, "flip") < augmentation.flip_probability)


def view_sizes(original_hw: tuple[int, int], view: View) -> tuple[int, int, int, int, int, int]:
    """What SDXL is told of the view: original h, w, crop top, left, target h, w (its time ids).

    The crop is measured in the resized image that the view is cut from. A mirrored view is cut from the mirrored
    image, where what lay right of the crop lies left of it.
    """
    placement = view.placement
    (top, left), bucket = placement.crop_top_left, placement.bucket
    if view.flipped:
        left = placement.resized_hw[1] - (left + bucket.width_px)
    return (*original_hw, top, left, bucket.height_px, bucket.width_px)

"""Aspect-ratio buckets: which shapes exist, and how an image is resized and cropped into one.

The list of shapes and the choice among them are those of kohya's sd-scripts (`make_bucket_resolutions`,
`BucketManager.select_bucket`), so that a data set lands in the same buckets here and there.
"""

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

ALSO_AT = "data.buckets.also_at"
"""The name of the setting of further resolutions."""


@dataclass(frozen=True, order=True)
class Bucket:
    """One image shape, in pixels. Sorted by height, then width."""

    height_px: int
    width_px: int


@dataclass(frozen=True)
class BucketRules:
    """How buckets are made and chosen; the fields of `data.buckets` in the configuration."""

    resolution: int = 1024
    min_px: int = 256
    max_px: int = 2048
    step_px: int = 64
    no_upscale: bool = False


@dataclass(frozen=True)
class OtherResolution:
    """That images are trained at this resolution as well; the fields of an entry of `data.buckets.also_at`."""

    resolution: int
    share: float | None = None
    """Of an epoch's images, in place of the main resolution; None: all of them, beside it."""


def other_resolutions(settings: Mapping[str, Any]) -> tuple[OtherResolution, ...]:
    """Those that a set was prepared with; what somebody has altered in them is passed over."""
    listed = settings.get(ALSO_AT)
    found = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    pairs = [(entry.get("resolution"), entry.get("share")) for entry in found]
    return tuple(
        OtherResolution(resolution, share)
        for resolution, share in pairs
        if type(resolution) is int and (share is None or (isinstance(share, float | int) and 0 < share < 1))
    )


@dataclass(frozen=True)
class Placement:
    """An image in its bucket: resize to `resized_hw`, then cut the bucket out at `crop_top_left` (both in pixels)."""

    bucket: Bucket
    resized_hw: tuple[int, int]
    crop_top_left: tuple[int, int]


def make_buckets(resolution: int, min_px: int, max_px: int, step_px: int) -> tuple[Bucket, ...]:
    """All shapes with sides in `min_px`..`max_px` on the grid of `step_px` and an area of at most `resolution`^2.

    Returns the shapes sorted by width / height, the square among them.
    """
    area = resolution * resolution
    square = resolution // step_px * step_px
    shapes = {(square, square)}
    for width in range(min_px, max_px + 1, step_px):
        height = min(max_px, area // width // step_px * step_px)
        if height >= min_px:
            shapes |= {(height, width), (width, height)}
    return tuple(sorted((Bucket(*shape) for shape in shapes if shape[0] > 0), key=_bucket_order))


def place(image_hw: tuple[int, int], buckets: tuple[Bucket, ...], rules: BucketRules) -> Placement:
    """Where an image of `image_hw` displayed pixels goes.

    Without `no_upscale`: the bucket of the nearest aspect ratio, the image resized to cover it and cropped at the
    centre. With it: never enlarged; the bucket is the image itself, reduced to the area of `resolution`^2 if it is
    larger, and each side cropped down to `step_px`.

    Args:
        buckets: as `make_buckets` returns them (sorted by aspect ratio).

    Raises:
        ValueError: with `no_upscale`, the image is smaller than one step.
    """
    if rules.no_upscale:
        return _centred(*_place_without_upscale(image_hw, rules))
    return _centred(*_place_covering(image_hw, buckets))


def at_resolution(rules: BucketRules, resolution: int) -> BucketRules:
    """The same rules at a lower resolution; sides scale with it, so that each aspect ratio has its bucket there."""
    least, most = (side * resolution / rules.resolution for side in (rules.min_px, rules.max_px))
    return replace(
        rules,
        resolution=resolution,
        min_px=max(rules.step_px, _down(least, rules.step_px)),
        max_px=max(resolution, _down(most, rules.step_px)),
    )


def bucket_at(bucket: Bucket, rules: BucketRules) -> Bucket:
    """Which bucket of a lower resolution the images of a bucket have there: that of the nearest aspect ratio; with
    `no_upscale` the same one, if it is no larger than that resolution.

    Args:
        rules: as `at_resolution` gives them.
    """
    return place((bucket.height_px, bucket.width_px), _buckets_of(rules), rules).bucket


def place_into(image_hw: tuple[int, int], bucket: Bucket) -> Placement:
    """An image resized to cover a given bucket, and cropped at the centre."""
    return _centred(*_place_covering(image_hw, (bucket,)))


def source_box(image_hw: tuple[int, int], placement: Placement) -> tuple[float, float, float, float]:
    """Top, left, bottom and right of what the crop keeps, in pixels of the image before the resize."""
    (top, left), (resized_h, resized_w), bucket = placement.crop_top_left, placement.resized_hw, placement.bucket
    scale_y, scale_x = image_hw[0] / resized_h, image_hw[1] / resized_w
    bottom, right = (top + bucket.height_px) * scale_y, (left + bucket.width_px) * scale_x
    return top * scale_y, left * scale_x, min(bottom, image_hw[0]), min(right, image_hw[1])


def _centred(bucket: Bucket, resized_hw: tuple[int, int]) -> Placement:
    top, left = (resized_hw[0] - bucket.height_px) // 2, (resized_hw[1] - bucket.width_px) // 2
    return Placement(bucket, resized_hw, (top, left))


@lru_cache(maxsize=16)
def _buckets_of(rules: BucketRules) -> tuple[Bucket, ...]:
    return make_buckets(rules.resolution, rules.min_px, rules.max_px, rules.step_px)


def _place_covering(image_hw: tuple[int, int], buckets: tuple[Bucket, ...]) -> tuple[Bucket, tuple[int, int]]:
    height, width = image_hw
    aspect = width / height
    after = bisect.bisect_left(buckets, aspect, key=_aspect)
    nearest = buckets[max(0, after - 1) : after + 1]
    bucket = min(nearest, key=lambda candidate: (abs(_aspect(candidate) - aspect), _aspect(candidate)))
    scale = bucket.height_px / height if aspect > _aspect(bucket) else bucket.width_px / width
    return bucket, (
        max(bucket.height_px, int(height * scale + 0.5)),
        max(bucket.width_px, int(width * scale + 0.5)),
    )


def _place_without_upscale(image_hw: tuple[int, int], rules: BucketRules) -> tuple[Bucket, tuple[int, int]]:
    height, width = resized_hw = image_hw
    area, step = rules.resolution * rules.resolution, rules.step_px
    if height * width > area:
        aspect = width / height
        by_width = _down(math.sqrt(area * aspect) + 0.5, step)
        by_height = _down(math.sqrt(area / aspect) + 0.5, step)
        if not by_width or not by_height:
            raise ValueError(f"its {width}x{height} px, reduced, are narrower than one bucket step of {step} px")
        # Of the two ways to round one side to the grid, take the one that keeps the aspect ratio better.
        width_error = abs(by_width / max(1, _down(by_width / aspect + 0.5, step)) - aspect)
        height_error = abs(_down(by_height * aspect + 0.5, step) / by_height - aspect)
        if width_error < height_error:
            resized_hw = (int(by_width / aspect + 0.5), by_width)
        else:
            resized_hw = (by_height, int(by_height * aspect + 0.5))
    sides = tuple(_down(min(side, rules.max_px), step) for side in resized_hw)
    if not all(sides):
        raise ValueError(f"its {width}x{height} px are smaller than one bucket step of {step} px (no_upscale)")
    return Bucket(sides[0], sides[1]), resized_hw


def _down(side: float, step: int) -> int:
    return int(side) // step * step


def _aspect(bucket: Bucket) -> float:
    return bucket.width_px / bucket.height_px


def _bucket_order(bucket: Bucket) -> tuple[float, int]:
    return _aspect(bucket), bucket.width_px

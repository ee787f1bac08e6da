"""Buckets against kohya's published procedure, and what every placement must satisfy."""

import math

import numpy as np
import pytest

from trainer.data.buckets import Bucket, BucketRules, make_buckets, place

Sides = tuple[int, int]
RULES = [(1024, 256, 2048, 64), (1024, 512, 2048, 64), (512, 256, 1024, 64), (128, 64, 256, 8)]


def _kohya_resolutions(side: int, min_size: int, max_size: int, divisible: int) -> list[Sides]:
    """`make_bucket_resolutions` of sd-scripts: (width, height), sorted."""
    max_area = side * side
    square = int(math.sqrt(max_area) // divisible) * divisible
    resolutions = {(square, square)}
    width = min_size
    while width <= max_size:
        height = min(max_size, int((max_area // width) // divisible) * divisible)
        if height >= min_size:
            resolutions.add((width, height))
            resolutions.add((height, width))
        width += divisible
    return sorted(resolutions)


def _kohya_select(
    width: int, height: int, resolutions: list[tuple[int, int]]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """`BucketManager.select_bucket` with upscaling: the bucket and the resized size, each (width, height)."""
    aspect = width / height
    errors = np.array([w / h for w, h in resolutions]) - aspect
    bucket = resolutions[int(np.abs(errors).argmin())]
    scale = bucket[1] / height if aspect > bucket[0] / bucket[1] else bucket[0] / width
    return bucket, (int(width * scale + 0.5), int(height * scale + 0.5))


@pytest.mark.parametrize(
    "rules", [(1024, 256, 2048, 64), (1024, 512, 2048, 64), (512, 256, 1024, 64), (128, 64, 256, 8)]
)
def test_equals_kohya(rules: tuple[int, int, int, int]) -> None:
    buckets = make_buckets(*rules)
    resolutions = _kohya_resolutions(*rules)
    assert sorted((b.width_px, b.height_px) for b in buckets) == resolutions
    rng = np.random.default_rng(0)
    for width, height in rng.integers(200, 3000, (2000, 2)).tolist():
        placement = place((height, width), buckets, BucketRules(*rules))
        bucket, resized = _kohya_select(width, height, resolutions)
        assert (placement.bucket.width_px, placement.bucket.height_px) == bucket
        assert placement.resized_hw == (resized[1], resized[0])


@pytest.mark.parametrize("image_hw", [(1, 1), (1, 10_000), (10_000, 1), (1024, 1024), (3, 7), (20_000, 21_000)])
@pytest.mark.parametrize("step", [8, 64])
def test_the_crop_lies_inside(image_hw: tuple[int, int], step: int) -> None:
    rules = BucketRules(step_px=step)
    placement = place(image_hw, make_buckets(1024, 256, 2048, step), rules)
    (top, left), (height, width) = placement.crop_top_left, placement.resized_hw
    bucket = placement.bucket
    assert min(top, left) >= 0
    assert top + bucket.height_px <= height and left + bucket.width_px <= width
    assert abs(height - bucket.height_px - 2 * top) <= 1 and abs(width - bucket.width_px - 2 * left) <= 1
    assert min(height - bucket.height_px, width - bucket.width_px) == 0


def test_no_upscale_never_enlarges() -> None:
    rules = BucketRules(no_upscale=True)
    assert place((300, 451), (), rules).bucket == Bucket(256, 448)
    assert place((300, 451), (), rules).resized_hw == (300, 451)
    assert place((300, 451), (), rules).crop_top_left == (22, 1)
    rng = np.random.default_rng(1)
    for height, width in rng.integers(64, 5000, (2000, 2)).tolist():
        placement = place((height, width), (), rules)
        bucket, (resized_h, resized_w) = placement.bucket, placement.resized_hw
        assert resized_h <= height + 1 and resized_w <= width + 1
        assert bucket.height_px * bucket.width_px <= 1024 * 1024 * 1.07
        assert bucket.height_px % 64 == bucket.width_px % 64 == 0 < bucket.height_px * bucket.width_px
        assert resized_h / resized_w == pytest.approx(height / width, rel=0.04)
    with pytest.raises(ValueError, match="smaller than one bucket step"):
        place((63, 400), (), rules)


def _kohya_no_upscale(width: int, height: int, side: int, steps: int) -> tuple[Sides, Sides]:
    """`BucketManager.select_bucket` with no_upscale: the bucket and the resized size, each (width, height)."""

    def rounded(x: float) -> int:
        return int(x + 0.5) - int(x + 0.5) % steps

    aspect, resized = width / height, (width, height)
    if width * height > side * side:
        resized_width = math.sqrt(side * side * aspect)
        by_width = rounded(resized_width)
        by_height = rounded(side * side / resized_width)
        width_aspect = by_width / rounded(by_width / aspect)
        height_aspect = rounded(by_height * aspect) / by_height
        if abs(width_aspect - aspect) < abs(height_aspect - aspect):
            resized = (by_width, int(by_width / aspect + 0.5))
        else:
            resized = (int(by_height * aspect + 0.5), by_height)
    return (resized[0] - resized[0] % steps, resized[1] - resized[1] % steps), resized


def test_no_upscale_equals_kohya() -> None:
    rng = np.random.default_rng(2)
    for width, height in rng.integers(400, 2040, (2000, 2)).tolist():
        placement = place((height, width), (), BucketRules(no_upscale=True))
        bucket, resized = _kohya_no_upscale(width, height, 1024, 64)
        assert (placement.bucket.width_px, placement.bucket.height_px) == bucket
        assert placement.resized_hw == (resized[1], resized[0])

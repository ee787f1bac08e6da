"""Flip and crop: the right pixels, the right numbers for SDXL, and draws that follow from the seed alone."""

import io
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.photographs import RULES, astronaut, coffee
from trainer.data.augment import Augmentation, View, draw_view, view_sizes
from trainer.data.buckets import Bucket, Placement, make_buckets, place
from trainer.data.images import BadImage, load_pixels, load_view

# 600 x 400 at a height of 128 is 192 wide: 64 columns to spare over the bucket, no rows.
WIDE = Placement(Bucket(128, 128), (128, 192), (0, 32))


def _encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("crop", "flipped", "sizes"),
    [
        ((0, 32), False, (400, 600, 0, 32, 128, 128)),
        ((0, 32), True, (400, 600, 0, 32, 128, 128)),  # at the centre: as many columns on either side
        ((0, 5), False, (400, 600, 0, 5, 128, 128)),
        ((0, 5), True, (400, 600, 0, 59, 128, 128)),  # 192 - (5 + 128)
        ((0, 64), True, (400, 600, 0, 0, 128, 128)),
        ((0, 0), True, (400, 600, 0, 64, 128, 128)),
    ],
)
def test_sizes_by_hand(crop: tuple[int, int], flipped: bool, sizes: tuple[int, ...]) -> None:
    assert view_sizes((400, 600), View(Placement(WIDE.bucket, WIDE.resized_hw, crop), flipped)) == sizes


def test_rows_of_a_tall_image_are_not_mirrored() -> None:
    tall = Placement(Bucket(128, 128), (192, 129), (10, 0))
    assert view_sizes((300, 201), View(tall, True)) == (300, 201, 10, 1, 128, 128)


def test_pixels_are_those_of_the_named_crop_of_the_mirrored_image() -> None:
    """Without resizing, so that they can be told exactly: the sizes of a flipped view name its place in the mirror."""
    picture = coffee().resize((192, 128))
    placement = Placement(Bucket(128, 128), (128, 192), (0, 5))
    pixels = np.empty((3, 128, 128), dtype=np.uint8)
    for flipped, whole in ((False, np.asarray(picture)), (True, np.asarray(picture)[:, ::-1])):
        view = View(placement, flipped)
        load_view(_encoded(picture), (128, 192), view, pixels)
        left = view_sizes((128, 192), view)[3]
        assert np.array_equal(pixels.transpose(1, 2, 0), whole[:, left : left + 128])


def test_bytes_and_files_give_the_same_pixels(tmp_path: Path) -> None:
    astronaut().save(tmp_path / "a.jpg")
    placement = place((512, 512), make_buckets(RULES.resolution, RULES.min_px, RULES.max_px, RULES.step_px), RULES)
    pixels = np.empty((3, 128, 128), dtype=np.uint8)
    load_view((tmp_path / "a.jpg").read_bytes(), (512, 512), View(placement, False), pixels)
    assert np.array_equal(pixels.transpose(1, 2, 0), load_pixels(tmp_path / "a.jpg", (512, 512), placement))


def test_no_augmentation_is_the_centre() -> None:
    assert all(draw_view(WIDE, Augmentation(), seed) == View(WIDE, False) for seed in range(50))
    assert all(draw_view(WIDE, Augmentation(flip_probability=1.0), seed) == View(WIDE, True) for seed in range(50))


def test_draws_are_uniform_and_follow_from_the_seed() -> None:
    augmentation = Augmentation(flip_probability=0.25, random_crop=True)
    views = [draw_view(WIDE, augmentation, seed) for seed in range(6500)]
    assert views[:20] == [draw_view(WIDE, augmentation, seed) for seed in range(20)]
    lefts = Counter(view.placement.crop_top_left[1] for view in views)
    assert set(lefts) == set(range(65)) and {view.placement.crop_top_left[0] for view in views} == {0}
    # 65 places of 100 visits each; both bounds lie beyond 4 standard deviations.
    assert min(lefts.values()) > 55 and max(lefts.values()) < 150
    flips = np.array([view.flipped for view in views])
    assert abs(flips.mean() - 0.25) < 0.02
    left = np.array([view.placement.crop_top_left[1] for view in views])
    assert abs(np.corrcoef(flips, left)[0, 1]) < 0.05


def test_a_bad_image_says_why() -> None:
    pixels = np.empty((3, 128, 128), dtype=np.uint8)
    with pytest.raises(BadImage, match="is empty"):
        load_view(b"", (400, 600), View(WIDE, False), pixels)
    with pytest.raises(BadImage, match="truncated"):
        load_view(_encoded(coffee())[:5000], (400, 600), View(WIDE, False), pixels)
    with pytest.raises(BadImage, match="512x512 px, but was 600x400"):
        load_view(_encoded(astronaut()), (400, 600), View(WIDE, False), pixels)


def test_pillows_remarks_are_no_errors() -> None:
    """A palette with transparency as bytes, at which Pillow warns; here and in a run with `-W error`."""
    file = io.BytesIO()
    coffee().quantize(64).save(file, "PNG", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = np.empty((3, 128, 128), dtype=np.uint8)
        load_view(file.getvalue(), (400, 600), View(WIDE, False), pixels)
    assert pixels.any()

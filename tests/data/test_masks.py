"""Masks drawn by hand, against a second computation of their means: views, odd files, shapes that do not fit."""

import io
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.data.photographs import RULES, coffee
from trainer.data.augment import Augmentation, View, draw_view
from trainer.data.buckets import Bucket, BucketRules, Placement, make_buckets, place
from trainer.data.images import load_mask, load_pixels, load_view
from trainer.data.masks import BadMask, fill_mask, fill_stored_mask


def drawn(size: tuple[int, int]) -> Image.Image:
    """An ellipse, white within and grey at one side; width and height."""
    image = Image.new("L", size)
    draw = ImageDraw.Draw(image)
    width, height = size
    draw.ellipse((0.1 * width, 0.2 * height, 0.7 * width, 0.9 * height), fill=255)
    draw.rectangle((0.8 * width, 0, width, 0.5 * height), fill=100)
    return image


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def means(values: np.ndarray, edges: list[Fraction]) -> np.ndarray:
    """Of rows between edges, each row weighed by how much of it lies there: in exact fractions, row by row."""
    result = np.zeros((len(edges) - 1, values.shape[1]))
    for i, (begin, end) in enumerate(pairwise(edges)):
        for row in range(int(begin), min(len(values), int(end) + 1)):
            covered = min(end, Fraction(row + 1)) - max(begin, Fraction(row))
            result[i] += float(covered / (end - begin)) * values[row]
    return result


def edges_of(place_px: int, bucket_px: int, resized_px: int, mask_px: int) -> list[Fraction]:
    """Where the latents of a crop begin and end in a mask of another size."""
    return [Fraction((place_px + 8 * i) * mask_px, resized_px) for i in range(bucket_px // 8 + 1)]


@pytest.mark.parametrize("mask_wh", [(600, 400), (300, 200), (97, 65), (15, 10), (2400, 1600)])
@pytest.mark.parametrize("random_crop", [False, True])
def test_each_latent_gets_the_mean_of_its_area(mask_wh: tuple[int, int], random_crop: bool) -> None:
    rules = BucketRules(resolution=256, min_px=64, max_px=512, step_px=64)
    centred = place((400, 600), make_buckets(256, 64, 512, 64), rules)
    values, seen = np.asarray(drawn(mask_wh)), set[int]()
    for seed in range(6):
        view = draw_view(centred, Augmentation(flip_probability=0.5, random_crop=random_crop), seed)
        (top, left), (resized_h, resized_w) = view.placement.crop_top_left, view.placement.resized_hw
        bucket = view.placement.bucket
        rows = means(values, edges_of(top, bucket.height_px, resized_h, mask_wh[1]))
        expected = means(rows.T, edges_of(left, bucket.width_px, resized_w, mask_wh[0])).T
        expected = expected[:, ::-1] if view.flipped else expected
        mask = np.empty((bucket.height_px // 8, bucket.width_px // 8), dtype=np.uint8)
        fill_mask(values, (400, 600), view, mask)
        assert np.abs(mask - expected).max() <= 0.5 + 1e-6
        seen |= set(mask.flatten().tolist())
    assert {0, 100, 255} < seen


def test_without_a_resize_it_is_the_mean_of_eight_by_eight() -> None:
    values = np.asarray(drawn((128, 64)))
    mask = np.empty((8, 16), dtype=np.uint8)
    load_mask(encoded(drawn((128, 64))), (64, 128), View(Placement(Bucket(64, 128), (64, 128), (0, 0)), False), mask)
    assert np.array_equal(mask, np.rint(values.reshape(8, 8, 16, 8).mean(axis=(1, 3))))


VIEW = View(place((400, 600), make_buckets(128, 64, 256, 64), RULES), False)


def _loaded(file: bytes, image_hw: tuple[int, int] = (400, 600)) -> np.ndarray:
    mask = np.empty((VIEW.placement.bucket.height_px // 8, VIEW.placement.bucket.width_px // 8), dtype=np.uint8)
    load_mask(file, image_hw, VIEW, mask)
    return mask


def test_modes_of_mask_files() -> None:
    grey = drawn((600, 400))
    expected = _loaded(encoded(grey))
    palette = Image.fromarray(np.where(np.asarray(grey) > 200, 7, 3).astype(np.uint8), "P")
    palette.putpalette([0] * 21 + [255] * 3 + [0] * 744)
    white_on_nothing = Image.new("RGBA", grey.size, (255, 255, 255, 0))
    white_on_nothing.putalpha(grey)
    same = {
        "RGB": grey.convert("RGB"),
        "RGBA": grey.convert("RGBA"),
        "transparent": white_on_nothing,
        "16 bit": Image.fromarray(np.asarray(grey).astype(np.uint16) * 257),
        "LA": grey.convert("LA"),
    }
    for name, image in same.items():
        assert np.abs(_loaded(encoded(image)).astype(int) - expected).max() <= 1, name
    black_and_white = np.where(np.asarray(grey) > 200, 255, 0).astype(np.uint8)
    hard = _loaded(encoded(Image.fromarray(black_and_white)))
    assert np.array_equal(_loaded(encoded(palette)), hard)
    assert np.array_equal(_loaded(encoded(Image.fromarray(black_and_white).convert("1"))), hard)
    assert np.abs(_loaded(encoded(grey.convert("RGB"), "JPEG", quality=95)).astype(int) - expected).max() < 12
    red = Image.new("RGB", (600, 400), (255, 0, 0))
    assert (_loaded(encoded(red)) == 76).all()  # its brightness, ITU-R 601


def test_bad_masks_say_why() -> None:
    whole = encoded(drawn((600, 400)))
    wrong = {
        b"": "its mask is empty",
        b"no image": "its mask is not an image of a known kind",
        whole[: len(whole) // 2]: "its mask cannot be decoded: image file is truncated",
        encoded(Image.new("F", (600, 400)), "TIFF"): "its mask has floating-point pixels, whose range is not known",
        encoded(drawn((400, 600))): "its mask is 400x600 px, no size of the image as displayed, 600x400 px",
        encoded(drawn((512, 512))): "its mask is 512x512 px, no size of the image as displayed, 600x400 px",
    }
    for file, reason in wrong.items():
        with pytest.raises(BadMask) as caught:
            _loaded(file)
        assert str(caught.value).startswith(reason)


@pytest.mark.parametrize("mask_wh", [(75, 50), (38, 25), (37, 25), (601, 400), (1200, 801)])
def test_sizes_that_rounding_explains(mask_wh: tuple[int, int]) -> None:
    assert np.abs(_loaded(encoded(drawn(mask_wh))).astype(int) - _loaded(encoded(drawn((600, 400))))).mean() < 12


def test_a_mask_belongs_to_the_image_as_displayed() -> None:
    """A camera's image lies on its side in the file; its mask was drawn upright, or has the same EXIF data."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = drawn((600, 400)).rotate(90, expand=True)  # of which the display turns the top to the right
    assert stored.size == (400, 600)
    turned, upright = _loaded(encoded(stored, exif=exif)), _loaded(encoded(drawn((600, 400))))
    assert np.array_equal(turned, upright)
    image = coffee().rotate(90, expand=True)
    image.putalpha(stored)
    mask = np.empty_like(upright)
    load_pixels(encoded(image, exif=exif), (400, 600), VIEW.placement, mask)
    assert np.array_equal(mask, upright)


def test_alpha_of_images() -> None:
    image = coffee()
    file = encoded(image)
    mask, pixels = np.zeros_like(_loaded(encoded(drawn((600, 400))))), np.empty((3, *_px()), dtype=np.uint8)
    load_view(file, (400, 600), VIEW, pixels, mask)
    assert (mask == 255).all()
    image.putalpha(drawn((600, 400)))
    load_view(encoded(image), (400, 600), VIEW, pixels)
    plain = pixels.copy()
    load_view(encoded(image), (400, 600), VIEW, pixels, mask)
    assert np.array_equal(plain, pixels)  # whether the mask is wanted or not
    assert np.array_equal(mask, _loaded(encoded(drawn((600, 400)))))
    mirrored = np.zeros_like(mask)
    load_view(encoded(image), (400, 600), View(VIEW.placement, True), pixels, mirrored)
    assert np.array_equal(mirrored, mask[:, ::-1]) and np.array_equal(pixels, plain[:, :, ::-1])


def _px() -> tuple[int, int]:
    return VIEW.placement.bucket.height_px, VIEW.placement.bucket.width_px


def test_alpha_masks_of_npz() -> None:
    values = np.asarray(drawn((128, 64))).astype(np.float32) / 255
    mask = np.empty((8, 16), dtype=np.uint8)
    fill_stored_mask(values, False, mask)
    expected = np.rint(np.asarray(drawn((128, 64))).reshape(8, 8, 16, 8).mean(axis=(1, 3)))
    assert np.abs(mask - expected).max() <= 1
    again = np.empty_like(mask)
    fill_stored_mask(mask / 255, True, again)
    assert np.array_equal(again, mask[:, ::-1])
    fill_stored_mask(values > 0.5, False, again)
    for wrong in (values[:-1], values * 2, values - 0.5, np.full_like(values, np.nan)):
        with pytest.raises(BadMask, match="alpha_mask"):
            fill_stored_mask(wrong, False, mask)

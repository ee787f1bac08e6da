"""Pixels from ordinary and odd files: right, or refused with a reason."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.photographs import RULES, astronaut, coffee
from trainer.data.buckets import Bucket, Placement, make_buckets, place
from trainer.data.images import BadImage, image_hw, load_pixels, pillow_rules

BUCKETS = make_buckets(RULES.resolution, RULES.min_px, RULES.max_px, RULES.step_px)


def _load(path: Path) -> np.ndarray:
    hw = image_hw(path)
    return load_pixels(path, hw, place(hw, BUCKETS, RULES))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize("size", [(600, 400), (211, 400), (150, 33), (100, 399)])
def test_equals_resizing_the_whole_and_cropping(tmp_path: Path, size: tuple[int, int]) -> None:
    image = coffee().resize(size)
    image.save(tmp_path / "a.png")
    hw = (size[1], size[0])
    placement = place(hw, BUCKETS, RULES)
    (top, left), bucket = placement.crop_top_left, placement.bucket
    whole = image.resize(placement.resized_hw[::-1], Image.Resampling.LANCZOS)
    expected = np.asarray(whole.crop((left, top, left + bucket.width_px, top + bucket.height_px)))
    pixels = load_pixels(tmp_path / "a.png", hw, placement)
    assert pixels.shape == (bucket.height_px, bucket.width_px, 3) and pixels.dtype == np.uint8
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_orientation_is_as_displayed(tmp_path: Path, orientation: int, ending: str) -> None:
    image = coffee().resize((300, 200))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    image.save(path, exif=exif)
    upright = np.asarray(image)
    expected = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, -1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, 1),
    }[orientation]
    height, width = expected.shape[:2]
    assert image_hw(path) == (height, width)
    whole = Placement(Bucket(height, width), (height, width), (0, 0))
    assert _difference(load_pixels(path, (height, width), whole), expected) < 6


def test_modes(tmp_path: Path) -> None:
    image = astronaut().resize((200, 200))
    grey = image.convert("L")
    grey16 = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    half = image.convert("RGBA")
    half.putalpha(Image.fromarray(np.full((200, 200), 0, dtype=np.uint8)))
    palette = image.quantize(256)
    files = {
        "rgb.png": image,
        "cmyk.jpg": image.convert("CMYK"),
        "palette.png": palette,
        "grey.png": grey,
        "grey16.png": grey16,
        "grey16.tif": grey16,
        "ycbcr.jpg": image.convert("YCbCr"),
        "la.png": image.convert("LA"),
        "bmp.bmp": image,
    }
    for name, file in files.items():
        file.save(tmp_path / name)
        pixels = _load(tmp_path / name)
        assert pixels.shape == (128, 128, 3)
        expected = _load(tmp_path / "rgb.png")
        if name.startswith(("grey", "la")):
            expected = np.repeat(np.asarray(Image.fromarray(expected).convert("L"))[..., None], 3, axis=2)
        assert _difference(pixels, expected) < 5, name
    half.save(tmp_path / "clear.png")
    assert (_load(tmp_path / "clear.png") == 255).all()
    palette.save(tmp_path / "palette_clear.png", transparency=bytes(256))
    assert (_load(tmp_path / "palette_clear.png") == 255).all()


def test_one_pixel_and_a_thread(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "dot.png")
    assert (_load(tmp_path / "dot.png") == (10, 20, 30)).all()
    Image.new("RGB", (1, 9000), (10, 20, 30)).save(tmp_path / "thread.png")
    assert _load(tmp_path / "thread.png").shape == (256, 64, 3)


def test_bad_files_say_why(tmp_path: Path) -> None:
    encoded = io.BytesIO()
    astronaut().save(encoded, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(encoded.getvalue()[:9000])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("this is no photograph\n" * 50)
    Image.fromarray(np.zeros((64, 64), dtype=np.float32)).save(tmp_path / "float.tif")
    header = io.BytesIO()
    Image.new("L", (30_000, 5_000)).save(header, "PNG")
    (tmp_path / "bomb.png").write_bytes(header.getvalue())
    reasons = {
        "cut.jpg": "truncated",
        "empty.jpg": "is empty",
        "text.jpg": "not an image",
        "float.tif": "floating-point",
        "bomb.png": "30000x5000 px; at most",
        "gone.jpg": "No such file",
    }
    with pillow_rules():
        for name, reason in reasons.items():
            with pytest.raises(BadImage, match=reason):
                _load(tmp_path / name)
    astronaut().save(tmp_path / "changed.png")
    with pytest.raises(BadImage, match="512x512 px, but was 100x100"):
        load_pixels(tmp_path / "changed.png", (100, 100), place((100, 100), BUCKETS, RULES))


def test_every_cut_and_flip_of_a_file_is_judged(tmp_path: Path) -> None:
    """Damaged files give pixels or a reason, never another exception."""
    rng = np.random.default_rng(0)
    path = tmp_path / "a.bin"
    small = coffee().resize((90, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    with pillow_rules():
        for form in ("JPEG", "PNG", "WEBP", "TIFF", "BMP"):
            encoded = io.BytesIO()
            small.save(encoded, form, exif=exif) if form != "BMP" else small.save(encoded, form)
            intact = np.frombuffer(encoded.getvalue(), dtype=np.uint8)
            for case in range(60):
                damaged = intact.copy()
                places = rng.integers(0, min(len(intact), 600 if case % 2 else len(intact)), 4)
                damaged[places] = rng.integers(0, 256, 4)
                path.write_bytes(damaged[: rng.integers(1, len(intact))] if case % 3 == 0 else damaged)
                try:
                    assert _load(path).dtype == np.uint8
                except BadImage as error:
                    assert str(error)

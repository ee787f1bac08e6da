"""One image file, on the disk or in memory: its size as displayed, from the header alone, and its pixels in a bucket.

Pillow's exceptions for hostile files are many; they all become `BadImage` with one line of reason. A decoder that runs
cannot be interrupted: what bounds its time are the pixels that the header tells (`trainer.raster`).
"""

import contextlib
import errno
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from trainer.data.augment import View
from trainer.data.buckets import Placement, source_box
from trainer.data.masks import FULL, BadMask, check_mask_shape, fill_mask
from trainer.errors import printable
from trainer.guards import DEFAULT_LIMITS, Limits, Refused
from trainer.raster import DECODE_ERRORS, FORMATS, check_scans, open_image

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"})

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_TRANSPOSITIONS = {
    2: (Image.Transpose.FLIP_LEFT_RIGHT,),
    3: (Image.Transpose.ROTATE_180,),
    4: (Image.Transpose.FLIP_TOP_BOTTOM,),
    5: (Image.Transpose.TRANSPOSE,),
    6: (Image.Transpose.ROTATE_270,),
    7: (Image.Transpose.TRANSVERSE,),
    8: (Image.Transpose.ROTATE_90,),
}
_SIDEWAYS = (5, 6, 7, 8)
_REDUCED_PX = 256
_LARGE_PIXELS = 25_000_000
_STRIP_PIXELS = 1 << 22
_one_large = threading.Lock()


class BadImage(Exception):
    """This image cannot be used; the message says why."""


@contextlib.contextmanager
def pillow_rules() -> Iterator[None]:
    """Within, in all threads: Pillow's remarks on odd files are not shown."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        yield


def image_hw(file: Path | bytes | IO[bytes], limits: Limits = DEFAULT_LIMITS) -> tuple[int, int]:
    """Height and width as displayed (after the EXIF orientation), without decoding the pixels; raises BadImage."""
    with _reasons(file), open_image(file, limits) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def has_alpha(file: Path | bytes | IO[bytes]) -> bool:
    """Whether the image has transparency, as its header says, without decoding the pixels; raises BadImage."""
    with _reasons(file), open_image(file) as image:
        return image.has_transparency_data


def load_pixels(
    file: Path | bytes, original_hw: tuple[int, int], placement: Placement, alpha: np.ndarray | None = None
) -> np.ndarray:
    """The image in its bucket: u8 [bucket height, bucket width, 3], RGB, transparency over white.

    LANCZOS in one pass over the part that the crop keeps, which equals resizing the whole and cropping (the box of
    the source is that of the crop), and costs no memory for the rest: a strip of 1 x 10,000 pixels may need it.

    Args:
        alpha: u8 [bucket height / 8, bucket width / 8], filled with the image's alpha channel, 255 where it has none.

    Raises:
        BadImage: it cannot be decoded, or its size is not `original_hw` any more.
    """
    with _reasons(file), open_image(file) as image, _in_turn(image):
        orientation = _orientation(image)
        width, height = image.size[::-1] if orientation in _SIDEWAYS else image.size
        if (height, width) != original_hw:  # told from the header, before a hostile size can take the memory
            raise BadImage(f"is {width}x{height} px, but was {original_hw[1]}x{original_hw[0]} px when it was listed")
        check_scans(image)
        if alpha is not None:
            alpha[:] = FULL
            if image.has_transparency_data:
                channel = np.asarray(_upright(_alpha_of(image), orientation))
                fill_mask(channel, original_hw, View(placement, False), alpha)
                del channel
        rgb = _upright(_to_rgb(image), orientation)
        top, left, bottom, right = source_box(original_hw, placement)
        size = placement.bucket.width_px, placement.bucket.height_px
        return np.asarray(rgb.resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom)))


def load_grey(file: Path | bytes, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
    """The image as displayed, in grey, transparency over white; a JPEG is reduced while it is decoded, to no less than
    256 px a side, which takes a fraction of the time.

    Raises:
        BadImage: it cannot be decoded.
    """
    with _reasons(file), open_image(file, limits) as image, _in_turn(image):
        orientation = _orientation(image)
        check_scans(image)
        image.draft("RGB", (_REDUCED_PX, _REDUCED_PX))
        return _upright(_to_rgb(image).convert("L"), orientation)


def load_view(
    file: Path | bytes, original_hw: tuple[int, int], view: View, pixels: np.ndarray, alpha: np.ndarray | None = None
) -> None:
    """Decode an image as one visit sees it into `pixels`, u8 [3, bucket height, bucket width].

    Args:
        alpha: as in `load_pixels`, of this view.

    Raises:
        BadImage: it cannot be decoded, or its size is not `original_hw`.
    """
    # Not for a while, as in `pillow_rules`: filters are the whole process's, and other threads come and go.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    upright = load_pixels(file, original_hw, view.placement, alpha)
    pixels[:] = (upright[:, ::-1] if view.flipped else upright).transpose(2, 0, 1)
    if alpha is not None and view.flipped:
        alpha[:] = alpha[:, ::-1].copy()


def load_reduced(file: Path | bytes, original_hw: tuple[int, int], least_px: int) -> Image.Image:
    """The whole image as displayed, RGB over white, for a small picture of it: a JPEG is decoded at a fraction of its
    size, but with sides of at least `least_px` where it has them; others are as large as they are.

    Raises:
        BadImage: it cannot be decoded, or its size is not `original_hw` any more.
    """
    with _reasons(file), open_image(file, DEFAULT_LIMITS) as image, _in_turn(image):
        orientation = _orientation(image)
        width, height = image.size[::-1] if orientation in _SIDEWAYS else image.size
        if (height, width) != original_hw:
            raise BadImage(f"is {width}x{height} px, but was {original_hw[1]}x{original_hw[0]} px when it was listed")
        check_scans(image)
        if image.format == "JPEG":
            image.draft(None, (least_px, least_px))
        return _upright(_to_rgb(image), orientation).copy()


def load_mask(file: Path | bytes, image_hw: tuple[int, int], view: View, mask: np.ndarray) -> None:
    """Fill `mask`, u8 [bucket height / 8, bucket width / 8], with what a mask file says of a view of its image.

    A mask of another size is stretched to the image as displayed. Colours count by their brightness, and what is
    transparent as black.

    Raises:
        BadMask: it cannot be decoded, or has another aspect ratio than the image.
    """
    try:
        most_pixels = max(Limits.image_pixels, image_hw[0] * image_hw[1])
        with _reasons(file), open_image(file, Limits(image_pixels=most_pixels)) as image, _in_turn(image):
            orientation = _orientation(image)
            width, height = image.size[::-1] if orientation in _SIDEWAYS else image.size
            check_mask_shape((height, width), image_hw)
            check_scans(image)
            fill_mask(np.asarray(_upright(_to_grey(image), orientation)), image_hw, view, mask)
    except BadImage as error:
        raise BadMask(f"its mask {error}") from error


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    for method in _TRANSPOSITIONS.get(orientation, ()):
        image = image.transpose(method)
    return image


@contextlib.contextmanager
def _in_turn(image: Image.Image) -> Iterator[None]:
    """Large images are decoded one at a time, whatever the number of threads: each takes 8 bytes a pixel."""
    if image.width * image.height < _LARGE_PIXELS:
        yield
    else:
        with _one_large:
            yield


@contextlib.contextmanager
def _reasons(file: Path | bytes | IO[bytes]) -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except Refused as error:
        raise BadImage(error.reason_for(file)) from None
    except UnidentifiedImageError:
        raise BadImage(f"is not an image of a known kind ({', '.join(FORMATS)})") from None
    except DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
            raise
        if isinstance(error, OSError) and error.strerror:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        raise BadImage(f"cannot be decoded: {printable(str(error)) or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 that is still to be applied, from what stands before the pixels."""
    if image.format == "TIFF":
        return 1  # Pillow's TIFF reader applies it by itself
    # The base class's method: PNG's own would decode the whole image to look for EXIF data behind the pixels.
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except DECODE_ERRORS:
        return 1  # damaged EXIF data says nothing about the pixels
    return value if value in _TRANSPOSITIONS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _scaled_to_bytes(image)
    if image.has_transparency_data:
        return _over(image, 255)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    image = _scaled_to_bytes(image)
    return (_over(image, 0) if image.has_transparency_data else image.convert("RGB")).convert("L")


def _alpha_of(image: Image.Image) -> Image.Image:
    return (image if "A" in image.getbands() else image.convert("RGBA")).getchannel("A")


def _over(image: Image.Image, background: int) -> Image.Image:
    """In RGB, over a grey; in strips, because each step of it would take a copy of the whole."""
    width, height = image.size
    flat = Image.new("RGB", image.size)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(height, top + rows))).convert("RGBA")
        under = Image.new("RGBA", strip.size, (background, background, background, 255))
        flat.paste(Image.alpha_composite(under, strip).convert("RGB"), (0, top))
    return flat


def _scaled_to_bytes(image: Image.Image) -> Image.Image:
    """The image, or in 8 bits if it has more, which Pillow would clip at 255 in place of scaling."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("has integer pixels beyond 16 bits, whose range is not known")
        scaled = values.astype(np.float32)
        scaled /= 257.0
        scaled += 0.5
        return Image.fromarray(scaled.astype(np.uint8))
    if image.mode == "F":
        raise BadImage("has floating-point pixels, whose range is not known")
    return image

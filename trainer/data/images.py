"""One image file, on the disk or in memory: its size as displayed, from the header alone, and its pixels in a bucket.

Pillow's exceptions for hostile files are many; they all become `BadImage` with one line of reason.
"""

import contextlib
import errno
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from trainer.data.augment import View
from trainer.data.buckets import Placement, source_box
from trainer.data.masks import FULL, BadMask, check_mask_shape, fill_mask

EXTENSIONS = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"})

# What Pillow's decoders have been seen to raise on damaged files.
_DECODE_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    SyntaxError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RuntimeError,
    AssertionError,
    MemoryError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
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


class BadImage(Exception):
    """This image cannot be used; the message says why."""


@contextlib.contextmanager
def pillow_rules() -> Iterator[None]:
    """Within, in all threads: an image beyond Pillow's pixel limit is an error; remarks on odd files are not shown."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
        yield


def image_hw(file: Path | bytes | IO[bytes]) -> tuple[int, int]:
    """Height and width as displayed (after the EXIF orientation), without decoding the pixels; raises BadImage."""
    with _reasons(), Image.open(_source(file)) as image:
        width, height = image.size
        return (width, height) if _orientation(image) in _SIDEWAYS else (height, width)


def has_alpha(file: Path | bytes | IO[bytes]) -> bool:
    """Whether the image has transparency, as its header says, without decoding the pixels; raises BadImage."""
    with _reasons(), Image.open(_source(file)) as image:
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
    with _reasons(), Image.open(_source(file)) as image:
        orientation = _orientation(image)
        width, height = image.size[::-1] if orientation in _SIDEWAYS else image.size
        if (height, width) != original_hw:  # told from the header, before a hostile size can take the memory
            raise BadImage(f"is {width}x{height} px, but was {original_hw[1]}x{original_hw[0]} px when it was listed")
        if alpha is not None:
            alpha[:] = FULL
            if image.has_transparency_data:
                channel = _upright(image.convert("RGBA").getchannel("A"), orientation)
                fill_mask(np.asarray(channel), original_hw, View(placement, False), alpha)
        rgb = _upright(_to_rgb(image), orientation)
        top, left, bottom, right = source_box(original_hw, placement)
        size = placement.bucket.width_px, placement.bucket.height_px
        return np.asarray(rgb.resize(size, Image.Resampling.LANCZOS, box=(left, top, right, bottom)))


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


def load_mask(file: Path | bytes, image_hw: tuple[int, int], view: View, mask: np.ndarray) -> None:
    """Fill `mask`, u8 [bucket height / 8, bucket width / 8], with what a mask file says of a view of its image.

    A mask of another size is stretched to the image as displayed. Colours count by their brightness, and what is
    transparent as black.

    Raises:
        BadMask: it cannot be decoded, or has another aspect ratio than the image.
    """
    try:
        with _reasons(), Image.open(_source(file)) as image:
            orientation = _orientation(image)
            mask_hw = image.size if orientation in _SIDEWAYS else image.size[::-1]
            check_mask_shape(mask_hw, image_hw)
            fill_mask(np.asarray(_upright(_to_grey(image), orientation)), image_hw, view, mask)
    except BadImage as error:
        raise BadMask(f"its mask {error}") from error


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    for method in _TRANSPOSITIONS.get(orientation, ()):
        image = image.transpose(method)
    return image


def _source(file: Path | bytes | IO[bytes]) -> Path | IO[bytes]:
    if isinstance(file, Path):
        empty = file.stat().st_size == 0
    elif isinstance(file, bytes):
        empty, file = not file, io.BytesIO(file)
    else:
        empty = not file.read(1)
        file.seek(0)
    if empty:
        raise BadImage("is empty")
    return file


@contextlib.contextmanager
def _reasons() -> Iterator[None]:
    try:
        yield
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("is not an image that Pillow knows") from None
    except _DECODE_ERRORS as error:
        if isinstance(error, OSError) and error.errno in _OUT_OF_RESOURCES:
            raise
        if isinstance(error, OSError) and error.strerror:
            raise BadImage(f"cannot be read: {error.strerror}") from error
        raise BadImage(f"cannot be decoded: {' '.join(str(error).split()) or type(error).__name__}") from error


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 that is still to be applied, from what stands before the pixels."""
    if image.format == "TIFF":
        return 1  # Pillow's TIFF reader applies it by itself
    # The base class's method: PNG's own would decode the whole image to look for EXIF data behind the pixels.
    try:
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except _DECODE_ERRORS:
        return 1  # damaged EXIF data says nothing about the pixels
    return value if value in _TRANSPOSITIONS else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _scaled_to_bytes(image)
    if image.has_transparency_data:
        return _over(image, 255).convert("RGB")
    return image.convert("RGB")


def _to_grey(image: Image.Image) -> Image.Image:
    image = _scaled_to_bytes(image)
    return (_over(image, 0) if image.has_transparency_data else image.convert("RGB")).convert("L")


def _over(image: Image.Image, background: int) -> Image.Image:
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (background, background, background, 255)), rgba)


def _scaled_to_bytes(image: Image.Image) -> Image.Image:
    """The image, or in 8 bits if it has more, which Pillow would clip at 255 in place of scaling."""
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("has integer pixels beyond 16 bits, whose range is not known")
        return Image.fromarray((values.astype(np.float32) / 257.0 + 0.5).astype(np.uint8))
    if image.mode == "F":
        raise BadImage("has floating-point pixels, whose range is not known")
    return image

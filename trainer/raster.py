"""Image files from outside, opened: only kinds whose pixels Pillow decodes by itself, and of a bounded size.

Left to itself, Pillow looks at what a file begins with, whatever its name: for PostScript it starts another program.
"""

import contextlib
import importlib
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import IO

from PIL import Image

from trainer.guards import Limits, Refused, open_regular

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
DECODE_ERRORS = (
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
)
"""What Pillow's decoders have been seen to raise on damaged files."""

_NOT_IMPORTED_AT_ONCE = ("WebP", "Tiff", "Avif")
_MOST_PIXELS_OF_SCANS = 2_000_000_000
_MOST_TIFF_VALUES = 1 << 18
_TIFF_BYTE_TYPES = (1, 2, 6, 7)
_READ_BYTES = 1 << 20

# Pillow's own limit is the whole process's, and half of what it calls an error is a warning; see `Limits.image_pixels`.
Image.MAX_IMAGE_PIXELS = None


@contextlib.contextmanager
def open_image(file: Path | str | bytes | IO[bytes], limits: Limits | None = None) -> Iterator[Image.Image]:
    """Open an image, of several frames the first; its pixels are decoded when they are first used.

    Args:
        file: a path, the bytes, or a seekable file.
        limits: of bytes and pixels; None: no more than what Pillow can open, for an image whose size was judged before.

    Raises:
        Refused: it is no regular file, beyond a limit, or empty.
        UnidentifiedImageError: it is of none of `FORMATS`.
        Exception: any of `DECODE_ERRORS`, here or when the pixels are decoded.
    """
    with _stream(file, limits) as stream:
        name = f"{file}: " if isinstance(file, Path | str) else ""
        if not (start := stream.read(16)):
            raise Refused(f"{name}is empty")
        if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            _check_tags(stream, name)
        with Image.open(stream, formats=_formats()) as image:
            width, height = image.size
            if limits is not None and width * height > limits.image_pixels:
                raise Refused(f"{name}has {width}x{height} px; at most {limits.image_pixels:,} pixels are decoded")
            yield image


def check_scans(image: Image.Image) -> None:
    """To be called before the pixels of an open image are decoded.

    A progressive JPEG may say in a few bytes, any number of times, that all of the image is to be gone through anew.

    Raises:
        Refused: that would take more than some ten seconds.
    """
    if "progressive" not in image.info or (stream := getattr(image, "fp", None)) is None:
        return
    before, scans = stream.tell(), 0
    stream.seek(0)
    end = b""
    while some := stream.read(_READ_BYTES):
        scans += (end + some).count(b"\xff\xda")
        end = some[-1:] if some.endswith(b"\xff") else b""
    stream.seek(before)
    if scans * image.width * image.height > _MOST_PIXELS_OF_SCANS:
        raise Refused(f"is a progressive JPEG of {scans:,} scans, which would take too long to decode")


@cache
def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow has; otherwise it imports all of its plugins at the first rare file."""
    Image.preinit()
    for name in _NOT_IMPORTED_AT_ONCE:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"PIL.{name}ImagePlugin")
    return tuple(name for name in FORMATS if name in Image.OPEN)


@contextlib.contextmanager
def _stream(file: Path | str | bytes | IO[bytes], limits: Limits | None) -> Iterator[IO[bytes]]:
    if isinstance(file, Path | str):
        with open_regular(file, None if limits is None else limits.image_bytes) as stream:
            yield stream
    else:
        yield BytesIO(file) if isinstance(file, bytes) else file


def _check_tags(stream: IO[bytes], name: str) -> None:
    """Refuses a TIFF with a tag of very many numbers, each of which Pillow makes an object of.

    https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf, section 2; BigTIFF has the same in wider fields.
    """
    stream.seek(0)
    head = stream.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    entry = struct.Struct(order + ("HHQ8x" if big else "HHI4x"))
    counted = struct.Struct(order + ("Q" if big else "H"))
    try:
        stream.seek(struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0])
        (entries,) = counted.unpack(stream.read(counted.size))
        tags = stream.read(min(entries, 1 << 16) * entry.size)
    except (struct.error, OverflowError, OSError, ValueError):
        return  # damaged, as Pillow will say
    for at in range(0, len(tags) - entry.size + 1, entry.size):
        tag, kind, count = entry.unpack_from(tags, at)
        if count > _MOST_TIFF_VALUES and kind not in _TIFF_BYTE_TYPES:
            raise Refused(f"{name}is a TIFF whose tag {tag} has {count:,} values")

"""Image files from outside, opened: only kinds whose pixels Pillow decodes by itself, and of a bounded size.

Left to itself, Pillow looks at what a file begins with, whatever its name: for PostScript it starts another program.
"""

import contextlib
import importlib
import os
import struct
import zlib
from collections.abc import Iterator
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import IO, cast

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
_TILE_SIDES, _SHORT = (322, 323), 3
_MOST_TILE_PIXELS = 1 << 26
_MOST_RUN_LENGTH_PIXELS = 4_000_000  # Pillow decodes a run-length coded BMP in Python
_WEBP_SHARE = 2  # WebP is decoded into three copies of four channels
_READ_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 16  # which Pillow reads at once of the pixels
_SMALL_FILE_BYTES = 1 << 18
_MOST_BESIDE_BYTES = 16 << 20
_MOST_READS_OF_HEAD, _MOST_READS = 200_000, 2_000_000

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
        is_tiff = start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        if is_tiff:
            _check_tags(stream, name)
        stream.seek(0)
        counted = _Counted(stream, name, count_bytes=not is_tiff) if _size(stream) > _SMALL_FILE_BYTES else None
        with Image.open(stream if counted is None else cast("IO[bytes]", counted), formats=_formats()) as image:
            width, height = image.size
            if limits is not None:
                most = limits.image_pixels // (_WEBP_SHARE if image.format == "WEBP" else 1)
                if width * height > most:
                    raise Refused(f"{name}has {width}x{height} px; at most {most:,} pixels are decoded")
            if counted is not None:
                counted.is_open = True
            yield image


def check_scans(image: Image.Image) -> None:
    """To be called before the pixels of an open image are decoded.

    A progressive JPEG may say in a few bytes, any number of times, that all of the image is to be gone through anew. A
    BMP in runs is decoded pixel by pixel.

    Raises:
        Refused: that would take more than some ten seconds.
    """
    pixels = image.width * image.height
    if _in_runs(image) and pixels > _MOST_RUN_LENGTH_PIXELS:
        raise Refused(f"is a BMP in runs of more than {_MOST_RUN_LENGTH_PIXELS:,} px; save it as PNG")
    if "progressive" not in image.info or (stream := getattr(image, "fp", None)) is None:
        return
    before, scans = stream.tell(), 0
    stream.seek(0)
    end = b""
    while some := stream.read(_READ_BYTES):
        scans += (end + some).count(b"\xff\xda")
        end = some[-1:] if some.endswith(b"\xff") else b""
    stream.seek(before)
    if scans * pixels > _MOST_PIXELS_OF_SCANS:
        raise Refused(f"is a progressive JPEG of {scans:,} scans, which would take too long to decode")


def _in_runs(image: Image.Image) -> bool:
    return image.format == "BMP" and any(tile[0] == "bmp_rle" for tile in getattr(image, "tile", ()))


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
    entry = struct.Struct(order + ("HHQ8s" if big else "HHI4s"))
    counted = struct.Struct(order + ("Q" if big else "H"))
    try:
        stream.seek(struct.unpack_from(order + ("Q" if big else "I"), head, 8 if big else 4)[0])
        (entries,) = counted.unpack(stream.read(counted.size))
        tags = stream.read(min(entries, 1 << 16) * entry.size)
    except (struct.error, OverflowError, OSError, ValueError):
        return  # damaged, as Pillow will say
    tile_pixels = 1
    for at in range(0, len(tags) - entry.size + 1, entry.size):
        tag, kind, count, value = entry.unpack_from(tags, at)
        if tag in _TILE_SIDES:
            tile_pixels *= struct.unpack_from(order + ("H" if kind == _SHORT else "I"), value)[0]
        if count > _MOST_TIFF_VALUES and kind not in _TIFF_BYTE_TYPES:
            raise Refused(f"{name}is a TIFF whose tag {tag} has {count:,} values")
    if tile_pixels > _MOST_TILE_PIXELS:
        raise Refused(f"{name}is a TIFF with tiles of {tile_pixels:,} px; at most {_MOST_TILE_PIXELS:,} are decoded")


def _size(stream: IO[bytes]) -> int:
    at = stream.tell()
    size = stream.seek(0, os.SEEK_END)
    stream.seek(at)
    return size


class _Counted:
    """A file of which Pillow reads only as much beside the pixels as images have there.

    It copies all EXIF data once for each piece of it, holds texts of any length several times, and looks at each of any
    number of empty chunks in Python.

    Args:
        count_bytes: not of a TIFF, where programs keep their layers in a tag.
    """

    def __init__(self, stream: IO[bytes], name: str, count_bytes: bool) -> None:
        self._stream, self._name, self._count_bytes = stream, name, count_bytes
        self._reads = self._beside_bytes = 0
        self.is_open = False
        self.seek, self.tell, self.readline = stream.seek, stream.tell, stream.readline
        if hasattr(stream, "fileno") and not isinstance(stream, BytesIO):
            self.fileno = stream.fileno

    def read(self, size: int = -1) -> bytes:
        """Raises Refused beyond the limits."""
        data = self._stream.read(size)
        self._reads += 1
        if size >= 0 and self._count_bytes and (size > _BLOCK_BYTES or not self.is_open):
            self._beside_bytes += len(data)
        if self._reads > (_MOST_READS if self.is_open else _MOST_READS_OF_HEAD):
            raise Refused(f"{self._name}is in too many pieces to be an image")
        if self._beside_bytes > _MOST_BESIDE_BYTES:
            raise Refused(f"{self._name}has more than {_MOST_BESIDE_BYTES >> 20} MiB beside its pixels")
        return data

    def close(self) -> None:
        """Left to whoever opened the file."""

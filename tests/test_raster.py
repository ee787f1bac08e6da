"""Image files made to take time or memory before their pixels or beside them: each is refused with a line, at once."""

import io
import struct
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from trainer.guards import Limits, Refused
from trainer.raster import check_scans, open_image


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _png(*extra: tuple[bytes, bytes], after: tuple[bytes, bytes] | None = None) -> bytes:
    head = (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    pixels = (b"IDAT", zlib.compress(bytes(25 * 8)))
    chunks = [head, *extra, pixels, *([after] if after else []), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _jpeg_with(inserted: bytes) -> bytes:
    data = _encoded(Image.new("RGB", (8, 8)), "JPEG")
    return data[:2] + inserted + data[2:]


def _tiff(*tags: tuple[int, int, int, int]) -> bytes:
    lines = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + lines + bytes(4)


def _big_tiff_of_many_tags() -> bytes:
    return b"II+\0" + struct.pack("<HHQQ", 8, 0, 16, 300_000) + (struct.pack("<HHQ", 65000, 1, 1) + bytes(8)) * 300_000


def _large_webp() -> bytes:
    data = bytearray(_encoded(Image.new("RGBA", (64, 64), (1, 2, 3, 4)), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    (bits,) = struct.unpack_from("<I", data, at)
    struct.pack_into("<I", data, at, (bits & ~((1 << 28) - 1)) | 8999 | 8999 << 14)
    return bytes(data)


def _run_length_bmp() -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, 9000, 9000, 1, 8, 1, 2 * 9000, 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", 1078 + 18_000, 0, 0, 1078) + head + bytes(1024) + bytes(2 * 9000)


def _jpeg_of_many_scans() -> bytes:
    data = _encoded(Image.new("RGB", (2000, 2000)), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 1000 + b"\xff\xd9"


_EXIF = b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65535 - 8)
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "PNG of empty chunks": (lambda: _png(*[(b"prVt", b"")] * 300_000), "in too many pieces"),
    "PNG with a long text": (lambda: _png((b"iTXt", b"k\0\0\0\0\0" + bytes(20 << 20))), "more than 16 MiB beside"),
    "PNG with a long text at its end": (
        lambda: _png(after=(b"iTXt", b"k\0\0\0\0\0" + bytes(20 << 20))),
        "more than 16 MiB beside",
    ),
    "JPEG of empty pieces": (lambda: _jpeg_with(b"\xff\xe9\0\2" * 300_000), "in too many pieces"),
    "JPEG of fill bytes": (lambda: _jpeg_with(b"\xff" * 1_000_000), "in too many pieces"),
    "JPEG with EXIF data in pieces": (lambda: _jpeg_with(_EXIF * 400), "more than 16 MiB beside"),
    "JPEG of many scans": (_jpeg_of_many_scans, "1,010 scans"),
    "GIF of empty comments": (
        lambda: b"GIF89a" + struct.pack("<HHBBB", 64, 64, 0, 0, 0) + b"!\xfe\x01x\0" * 300_000,
        "in too many pieces",
    ),
    "TIFF of many tags": (_big_tiff_of_many_tags, "in too many pieces"),
    "TIFF with a tag of many numbers": (lambda: _tiff((273, 4, 1 << 28, 8)), "tag 273 has 268,435,456 values"),
    "TIFF of a large tile": (lambda: _tiff((322, 4, 1, 30_000), (323, 4, 1, 30_000)), "tiles of 900,000,000 px"),
    "BMP in runs": (_run_length_bmp, "a BMP in runs"),
    "WebP of half as many pixels": (_large_webp, "has 9000x9000 px"),
    "EPS": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "cannot identify"),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("in_memory", [False, True], ids=["file", "bytes"])
def test_a_hostile_image_is_refused_at_once(tmp_path: Path, kind: str, in_memory: bool) -> None:
    make, reason = HOSTILE[kind]
    path = tmp_path / "image.jpg"
    path.write_bytes(data := make())
    begin = time.process_time()
    with pytest.raises((Refused, OSError), match=reason), open_image(data if in_memory else path, Limits()) as image:
        check_scans(image)
        image.load()
    assert time.process_time() - begin < 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BMP", "GIF", "AVIF", "WEBP"])
def test_images_above_the_size_from_which_reads_are_counted_decode_as_before(tmp_path: Path, kind: str) -> None:
    noise = Image.effect_noise((700, 900), 100).convert("P" if kind == "GIF" else "RGB")
    options = {"quality": 100} if kind in ("JPEG", "AVIF", "WEBP") else {}
    path = tmp_path / "image"
    path.write_bytes(data := _encoded(noise, kind, **options))
    assert len(data) > 1 << 18
    with Image.open(path) as plain:
        expected = plain.convert("RGB").tobytes()
    for file in (path, data, io.BytesIO(data)):
        with open_image(file, Limits()) as image:
            check_scans(image)
            assert image.convert("RGB").tobytes() == expected


@pytest.mark.parametrize("compression", [None, "tiff_deflate", "tiff_lzw", "jpeg"])
def test_every_way_of_reading_a_tiff(tmp_path: Path, compression: str | None) -> None:
    noise = Image.effect_noise((700, 900), 100).convert("RGB")
    noise.save(path := tmp_path / "image.tif", compression=compression)
    with Image.open(path) as plain:
        expected = plain.tobytes()
    with open_image(path) as image, open_image(path.read_bytes()) as same:
        assert image.tobytes() == same.tobytes() == expected

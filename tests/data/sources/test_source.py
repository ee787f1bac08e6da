"""A stretch of a file as a file of its own."""

import io
import os
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from trainer.data.images import BadImage, image_hw
from trainer.data.sources.source import WHOLE, open_range, read_bytes


def test_reads_as_the_bytes_would(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 300)
    for offset, length in ((0, WHOLE), (1000, 40_000), (50_000, WHOLE), (7, 0)):
        expected = io.BytesIO(read_bytes(str(path), offset, length))
        with open_range(str(path), offset, length) as file:
            for place, whence, count in (
                (5, 0, 10),
                (0, 1, 20_000),
                (-30, 1, 100),
                (-5, 2, 100),
                (60_000, 0, 9),
                (0, 0, -1),
            ):
                try:
                    at = expected.seek(place, whence)
                except ValueError:
                    continue
                assert file.seek(place, whence) == at and file.read(count) == expected.read(count)


def test_the_header_of_an_image_within_a_file(tmp_path: Path) -> None:
    """Only what is before the pixels is read: what lies behind may be anything, or missing."""
    encoded = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "x" * 40_000  # a long header
    Image.fromarray(data.astronaut()[:300]).save(encoded, "JPEG", exif=exif)
    (tmp_path / "a.bin").write_bytes(b"before" + encoded.getvalue())
    with open_range(str(tmp_path / "a.bin"), 6, len(encoded.getvalue())) as file:
        assert image_hw(file) == (512, 300)
    os.truncate(tmp_path / "a.bin", 45_000)
    with open_range(str(tmp_path / "a.bin"), 6, len(encoded.getvalue())) as file:
        assert image_hw(file) == (512, 300)
    os.truncate(tmp_path / "a.bin", 30_000)
    with open_range(str(tmp_path / "a.bin"), 6, 29_994) as file, pytest.raises(BadImage):
        image_hw(file)
    with open_range(str(tmp_path / "a.bin"), 6, 0) as file, pytest.raises(BadImage, match="is empty"):
        image_hw(file)

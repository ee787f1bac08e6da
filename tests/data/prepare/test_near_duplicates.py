"""Of copies of one photograph one stays, whatever their size and compression; other parts of it are other pictures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.photographs import astronaut, coffee, settings_for, write_crops
from tests.data.prepare.test_changes import held, prepare
from tests.data.prepare.test_filters import left_out
from trainer.config.sections.data.filters_config import FiltersConfig
from trainer.data.catalog.catalog import open_catalog
from trainer.data.catalog.settings import PrepareSettings

COPIES = {"photos/b-smaller", "photos/c-compressed", "photos/d-turned", "photos/e.other", "photos/f-twice"}


def near(settings: PrepareSettings, bits: int | None = 6, **filters: Any) -> PrepareSettings:
    return replace(settings, filters=FiltersConfig(near_duplicates=bits, **filters))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two photographs, the first of them in six files, and parts of both."""
    folder = tmp_path / "photos"
    write_crops(folder, 20)
    picture = astronaut()
    picture.save(folder / "a-large.png")
    picture.resize((300, 300), Image.Resampling.BICUBIC).save(folder / "b-smaller.jpg", quality=85)
    picture.save(folder / "c-compressed.jpg", quality=35)
    exif = Image.Exif()
    exif[274] = 6  # is to be turned by 90 degrees to be displayed
    picture.resize((400, 400)).transpose(Image.Transpose.ROTATE_90).save(folder / "d-turned.jpg", exif=exif)
    picture.resize((200, 200)).save(folder / "e.other.webp", quality=60)
    (folder / "f-twice.png").write_bytes((folder / "a-large.png").read_bytes())
    coffee().save(folder / "z-coffee.jpg")
    return folder


def test_copies_go_and_parts_stay(photos: Path, tmp_path: Path) -> None:
    plain = settings_for(tmp_path / "prepared", photos)
    prepare(plain)
    whole = held(plain.prepared)
    assert len(whole) == 27
    counts, done, encoded = prepare(near(plain))
    assert left_out(plain.prepared).keys() == COPIES and not encoded and done.images == 22
    assert {*left_out(plain.prepared).values()} == {f"is nearly the same picture as {photos}/a-large.png"}
    assert (counts.scan.new, counts.scan.known, counts.scan.filtered) == (0, 22, {"near duplicates": 5})
    # Nothing has to be hashed or decided anew.
    again, same, encoded = prepare(near(plain))
    assert (same, encoded, again.scan.known, again.scan.filtered) == (done, [], 22, counts.scan.filtered)
    # Others judge first; what they leave out stands for no other picture.
    counts, done, encoded = prepare(near(plain, min_side_px=250))
    assert counts.scan.filtered["near duplicates"] == 4 and "photos/e.other" in left_out(plain.prepared)
    counts, done, encoded = prepare(plain)
    assert not encoded and held(plain.prepared) == whole and not left_out(plain.prepared)


def test_when_the_largest_goes_the_next_takes_its_place(photos: Path, tmp_path: Path) -> None:
    settings = near(settings_for(tmp_path / "prepared", photos))
    _, done, encoded = prepare(settings)
    assert len(encoded) == done.images == 22
    (photos / "a-large.png").unlink()
    counts, done, encoded = prepare(settings)  # c is as large as f
    assert (counts.scan.new, counts.scan.removed, len(encoded), done.images) == (1, 1, 1, 22)
    assert left_out(settings.prepared).keys() == COPIES - {"photos/c-compressed"}
    astronaut().resize((700, 700)).save(photos / "y-largest.png")
    counts, done, encoded = prepare(settings)
    assert len(encoded) == 1 and done.images == 22
    assert left_out(settings.prepared).keys() == COPIES
    (photos / "y-largest.png").unlink()
    counts, done, encoded = prepare(settings)
    assert (counts.scan.back, counts.scan.new, encoded) == (1, 0, [])
    assert left_out(settings.prepared).keys() == COPIES - {"photos/c-compressed"}
    assert "photos/c-compressed" in held(settings.prepared)


def test_hashes_are_computed_once(photos: Path, tmp_path: Path) -> None:
    settings = near(settings_for(tmp_path / "prepared", photos))
    prepare(settings)

    def hashes() -> dict[int, int]:
        with open_catalog(settings.prepared, read_only=True) as connection:
            return dict(connection.execute("SELECT content, hash FROM perceptual"))

    first = hashes()
    assert len(first) == 26  # two files are the same
    values = np.array([*first.values()])
    assert len(np.unique(values)) > 20
    (photos / "a-large.png").rename(photos / "renamed.png")
    prepare(settings)
    assert hashes() == first
    with open_catalog(settings.prepared) as connection:  # what stands there is taken
        connection.execute("UPDATE perceptual SET hash = 0")
    counts, _, _ = prepare(settings)
    assert counts.scan.filtered == {"near duplicates": 26}


def test_images_that_are_not_encoded_are_compared_as_well(photos: Path, tmp_path: Path) -> None:
    plain = settings_for(tmp_path / "prepared", photos, mode="images")
    prepare(plain)
    for _ in range(2):
        counts, done, _ = prepare(near(plain))
        assert counts.scan.filtered == {"near duplicates": 5} and done.images == 22
        counts, done, _ = prepare(plain)
        assert done.images == 27

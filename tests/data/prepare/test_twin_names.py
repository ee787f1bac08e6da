"""Images whose names differ in their ending alone: all are used, under keys that stay."""

import json
import shutil
from pathlib import Path

import pytest

from tests.data.photographs import astronaut, coffee, settings_for, write_crops
from tests.data.prepare.test_changes import caption, held, prepare
from trainer.data.catalog.settings import PrepareSettings


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve crops; `dup` as .jpg, .png and .webp, of which two are different pictures."""
    folder = tmp_path / "photos"
    write_crops(folder, 12)
    astronaut().resize((128, 128)).save(folder / "dup.jpg")
    coffee().resize((150, 100)).save(folder / "dup.png")
    (folder / "dup.jpeg").write_bytes((folder / "dup.jpg").read_bytes())
    caption(folder, "dup", "both")
    return folder


def bad(settings: PrepareSettings) -> dict[str, str]:
    lines = map(json.loads, (settings.prepared / "bad.jsonl").read_text().splitlines())
    return {Path(line["path"]).name: line["reason"] for line in lines}


def keys(settings: PrepareSettings) -> set[str]:
    return {key.removeprefix("photos/") for key in held(settings.prepared) if "crop-" not in key}


def test_both_are_used_and_the_same_picture_once(photos: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "prepared", photos)
    counts, done, encoded = prepare(settings)
    assert (counts.scan.new, counts.scan.bad, len(encoded), done.left_out) == (14, 1, 14, 1)
    assert keys(settings) == {"dup", "dup.png"}
    assert bad(settings) == {"dup.jpg": f"is the same picture as {photos}/dup.jpeg"}
    assert held(settings.prepared)["photos/dup.png"][0] == "both"
    before = held(settings.prepared)
    for _ in range(2):
        counts, again, encoded = prepare(settings)
        assert (counts.scan.known, counts.scan.bad, encoded, again) == (14, 1, [], done)
    caption(photos, "dup", "edited")
    counts, _, encoded = prepare(settings)
    assert counts.scan.captions == 2 and not encoded
    coffee().crop((0, 0, 90, 120)).save(photos / "dup.png")
    counts, _, encoded = prepare(settings)
    assert (counts.scan.changed, len(encoded)) == (1, 1) and keys(settings) == {"dup", "dup.png"}
    now = held(settings.prepared)
    assert now["photos/dup"][2] == before["photos/dup"][2] and now["photos/dup.png"] != before["photos/dup.png"]


def test_each_keeps_its_key_when_another_goes_or_comes(photos: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path / "prepared", photos)
    prepare(settings)
    before = held(settings.prepared)
    for ending in ("jpg", "jpeg"):
        shutil.move(photos / f"dup.{ending}", tmp_path)
    counts, done, encoded = prepare(settings)
    assert not encoded and done.images == 13 and (counts.scan.removed, counts.scan.renamed) == (1, 0)
    assert held(settings.prepared)["photos/dup.png"] == before["photos/dup.png"] and keys(settings) == {"dup.png"}
    # A third, of a name before it, gets what is free.
    astronaut().crop((200, 0, 400, 200)).save(photos / "dup.bmp")
    counts, done, encoded = prepare(settings)
    assert len(encoded) == 1 and keys(settings) == {"dup", "dup.png"} and done.images == 14
    shutil.move(tmp_path / "dup.jpg", photos)
    counts, done, encoded = prepare(settings)
    assert not encoded and counts.scan.back == 1 and keys(settings) == {"dup", "dup.png", "dup.jpg"}
    # The one that had the key by itself is renamed, and another is.
    (photos / "dup.bmp").rename(photos / "other.bmp")
    counts, done, encoded = prepare(settings)
    assert not encoded and keys(settings) == {"other", "dup.png", "dup.jpg"}
    (photos / "dup.png").rename(photos / "third.png")
    (photos / "dup.jpg").unlink()
    counts, done, encoded = prepare(settings)
    assert not encoded and keys(settings) == {"other", "third"}
    coffee().resize((100, 100)).save(photos / "dup.png")  # forgotten by now
    prepare(settings)
    assert keys(settings) == {"other", "third", "dup"}


def test_what_was_prepared_under_the_key_keeps_it(photos: Path, tmp_path: Path) -> None:
    for ending in ("jpg", "jpeg"):
        shutil.move(photos / f"dup.{ending}", tmp_path)
    settings = settings_for(tmp_path / "prepared", photos)
    prepare(settings)
    before = held(settings.prepared)
    shutil.move(tmp_path / "dup.jpg", photos)
    _, _, encoded = prepare(settings)
    assert len(encoded) == 1 and keys(settings) == {"dup", "dup.jpg"}
    assert held(settings.prepared)["photos/dup"] == before["photos/dup"]
    # It becomes the same picture as the other.
    (photos / "dup.png").write_bytes((photos / "dup.jpg").read_bytes())
    counts, done, _ = prepare(settings)
    assert keys(settings) == {"dup"} and bad(settings) == {"dup.jpg": f"is the same picture as {photos}/dup.png"}
    assert done.images == 13 and counts.scan.bad == 1


def test_a_longer_key_may_be_that_of_another_name(photos: Path, tmp_path: Path) -> None:
    astronaut().crop((0, 0, 100, 150)).save(photos / "dup.png.jpg")
    settings = settings_for(tmp_path / "prepared", photos)
    prepare(settings)
    assert keys(settings) == {"dup", "dup.png", "dup.png.jpg"}
    _, _, encoded = prepare(settings)
    assert not encoded and keys(settings) == {"dup", "dup.png", "dup.png.jpg"}

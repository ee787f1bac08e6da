"""kohya's metadata with latents or images: which file belongs to a key, and what is said where there is none."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.data.kohya_files import entry, write_files, write_metadata
from trainer.config.sections.data.sources import KohyaJsonSource
from trainer.data.sources.kohya import list_kohya_json
from trainer.data.sources.source import SourceItem
from trainer.errors import UserError


def _items(tmp_path: Path, entries: dict[str, Any], **folders: Path) -> dict[str, SourceItem]:
    write_metadata(tmp_path / "meta.json", entries)
    source = KohyaJsonSource(type="kohya_json", path=tmp_path / "meta.json", repeats=2, **folders)
    items = list(list_kohya_json(source, "meta", Counter(), tmp_path))
    assert len(items) == len(entries)
    assert [path.name for path in tmp_path.glob("tmp*")] == []
    return {item.key.removeprefix("meta/"): item for item in items}


def test_old_names_win_and_sized_names_are_found(tmp_path: Path) -> None:
    latents = tmp_path / "latents"
    names = [
        "both.npz",
        "both_0300x0200_sdxl.npz",
        "sized_0300x0200_sdxl.npz",
        "sub/unsized_12000x0200_sdxl.npz",
        "sub/unsized_0300x0200.npz",
        "twice_0400x0200_sdxl.npz",
        "twice_0300x0200_sdxl.npz",
        "flipped_flip.npz",
        "other_size_0300x0200_sdxl.npz",
    ]
    write_files(latents, dict.fromkeys(names, b"12345"))
    sized = entry(1, image_size=[300, 200])
    entries = {
        "both": sized,
        "sized": sized,
        "sub/unsized": entry(2),
        "twice": entry(3),
        "flipped": sized,
        "other_size": entry(4, image_size=[301, 200]),
        "gone": entry(5),
    }
    items = _items(tmp_path, entries, latents=latents)
    found = {key: item.file.removeprefix(f"{latents}/") for key, item in items.items() if not item.problem}
    assert found == {
        "both": "both.npz",
        "sized": "sized_0300x0200_sdxl.npz",
        "sub/unsized": "sub/unsized_12000x0200_sdxl.npz",
        "twice": "twice_0300x0200_sdxl.npz",
        "other_size": "other_size_0300x0200_sdxl.npz",
    }
    assert {key for key, item in items.items() if item.problem == "there are no latents of this name"} == {
        "flipped",
        "gone",
    }
    item = items["sized"]
    assert (item.kind, item.repeats, item.bucket_hw, item.original_hw) == ("latents", 2, (64, 128), (200, 300))
    assert (item.file_bytes, item.offset, item.length) == (5, 0, -1)
    assert item.caption == '{"caption":"a picture of 1","tags":"tag1, solo"}'
    assert items["twice"].original_hw is None and items["twice"].caption == (
        '{"caption":"a picture of 3","tags":"tag3, solo"}'
    )


def test_keys_may_be_absolute_or_have_an_ending(tmp_path: Path) -> None:
    latents, elsewhere = tmp_path / "latents", tmp_path / "elsewhere"
    write_files(latents, {"a.b.npz": b"1", "c.npz": b"1"})
    write_files(elsewhere, {"d.npz": b"1"})
    items = _items(tmp_path, {"a.b": entry(1), "c.PNG": entry(2), f"{elsewhere}/d.jpg": entry(3)}, latents=latents)
    assert not any(item.problem for item in items.values())
    assert items["a.b"].file == str(latents / "a.b.npz")
    assert items["c.PNG"].file == str(latents / "c.npz")
    assert items[f"{elsewhere}/d.jpg"].file == str(elsewhere / "d.npz")


def test_images(tmp_path: Path) -> None:
    images = tmp_path / "images"
    write_files(images, {"a.webp": b"1", "sub/b.JPG": b"1", "c.png": b"1"})
    items = _items(tmp_path, {"a": entry(1), "sub/b": entry(2), "c.png": entry(3), "d": entry(4)}, images=images)
    names = {key: item.file.removeprefix(f"{images}/") for key, item in items.items()}
    assert names == {"a": "a.webp", "sub/b": "sub/b.JPG", "c.png": "c.png", "d": "d"}
    assert {item.kind for item in items.values()} == {"image"}
    assert items["d"].problem == "there is no image of this name"


def test_a_missing_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        _items(tmp_path, {}, latents=tmp_path / "nope")


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    write_files(tmp_path / "images", {"a/b.jpg": b"1", "a/b/c.png": b"1"})
    items = _items(tmp_path, {"a/b": {}, "a/b/c": {}, "a": {}}, images=tmp_path / "images")
    assert items["a/b"].file.endswith("a/b.jpg") and items["a/b/c"].file.endswith("c.png")
    assert items["a"].problem == "there is no image of this name"


def test_files_whose_names_are_not_utf8_do_no_harm(tmp_path: Path) -> None:
    write_files(tmp_path / "latents", {"a_0300x0200_sdxl.npz": b"1"})
    (tmp_path / os.fsdecode(b"latents/b\xff_0300x0200_sdxl.npz")).write_bytes(b"1")
    items = _items(tmp_path, {"a": {}, "b": {}}, latents=tmp_path / "latents")
    assert items["a"].problem == "" and items["b"].problem == "there are no latents of this name"

"""Tars of `.npz`: members are found by the last part of the key, and nothing is guessed."""

from collections import Counter
from pathlib import Path

import pytest

from tests.data.kohya_files import entry, kohya_npz, write_metadata, write_tar
from trainer.config.sections.data.sources import LatentTarsSource
from trainer.data.sources.latent_tars import list_latent_tars
from trainer.data.sources.source import SourceItem, read_bytes
from trainer.errors import UserError


def _items(tmp_path: Path, keys: list[str]) -> tuple[dict[str, SourceItem], Counter[str]]:
    write_metadata(tmp_path / "meta.json", {key: entry(i) for i, key in enumerate(keys)})
    ignored: Counter[str] = Counter()
    source = LatentTarsSource(type="latent_tars", metadata=tmp_path / "meta.json", tars=tmp_path / "tars", repeats=3)
    items = list(list_latent_tars(source, "meta", ignored, tmp_path))
    return {item.key.removeprefix("meta/"): item for item in items}, ignored


def test_members_by_offset(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/0001.tar", {"1.npz": kohya_npz(1), "readme.txt": b"x", "1001.npz": kohya_npz(2)})
    write_tar(tmp_path / "tars/0002.tar", {"./2.npz": kohya_npz(3), "77.npz": b""})
    items, ignored = _items(tmp_path, ["danbooru/1", "danbooru/2", "danbooru/3", "danbooru/1001"])
    assert list(items) == ["danbooru/1", "danbooru/2", "danbooru/1001"]
    for key, seed in (("danbooru/1", 1), ("danbooru/1001", 2), ("danbooru/2", 3)):
        item = items[key]
        assert read_bytes(item.file, item.offset, item.length) == kohya_npz(seed)
        assert (item.kind, item.repeats, item.bucket_hw) == ("latents", 3, (64, 128))
    assert ignored == {
        "metadata without latents": 1,
        "latents without metadata": 1,
        "tar members that are no .npz": 1,
    }


def test_tars_of_two_data_sets_with_the_same_ids(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/danbooru/0001.tar", {"1.npz": kohya_npz(1)})
    write_tar(tmp_path / "tars/e621/0001.tar", {"1.npz": kohya_npz(2)})
    items, _ = _items(tmp_path, ["e621/1", "danbooru/1"])
    assert "/e621/" in items["e621/1"].file and "/danbooru/" in items["danbooru/1"].file


def test_an_id_that_two_entries_claim_stops_it(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/0001.tar", {"1.npz": kohya_npz(1)})
    with pytest.raises(UserError, match=r"'danbooru/1' and an entry before it both have the name of one member"):
        _items(tmp_path, ["e621/1", "danbooru/1"])


def test_an_entry_that_comes_twice_is_left_to_the_scan(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/0001.tar", {"1.npz": kohya_npz(1)})
    (tmp_path / "meta.json").write_text('{"a/1": {"caption": "one"}, "a/1": {"caption": "two"}}')
    source = LatentTarsSource(type="latent_tars", metadata=tmp_path / "meta.json", tars=tmp_path / "tars")
    first, second = list_latent_tars(source, "meta", Counter(), tmp_path)
    assert first.key == second.key and (first.file, first.offset) == (second.file, second.offset)


def test_a_damaged_tar_gives_what_lies_before(tmp_path: Path) -> None:
    write_tar(tmp_path / "tars/0001.tar", {"1.npz": kohya_npz(1), "2.npz": kohya_npz(2)})
    path = tmp_path / "tars/0001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    items, ignored = _items(tmp_path, ["a/1", "a/2"])
    assert items["a/1"].problem == "" and "a/2" not in items
    (damage,) = (item for item in items.values() if item.problem)
    assert "the tar ends before this member does" in damage.problem and damage.file == str(path)
    assert ignored["metadata without latents"] == 1


def test_no_tars(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with pytest.raises(UserError, match=r"there is no \.tar file"):
        _items(tmp_path, ["a/1"])

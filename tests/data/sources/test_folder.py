"""Listing a folder: keys, captions, what is ignored, and links that go in circles."""

from collections import Counter
from pathlib import Path

import pytest

from tests.data.records import caption_text
from trainer.config.sections.data.sources import FolderSource
from trainer.data.sources.folder import list_folder
from trainer.data.sources.listing import source_names
from trainer.data.sources.sidecars import read_caption
from trainer.errors import UserError


def test_lists_images_below_the_folder(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for name in ("a.jpg", "sub/deep/b.PNG", "sub/a.webp", "c.txt", "d.npz", ".hidden.jpg", "no_ending", "e.x.jpeg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "sub" / "circle").symlink_to(root)
    ignored: Counter[str] = Counter()
    items = {item.key: item for item in list_folder(FolderSource(path=root), "photos", ignored)}
    assert sorted(items) == ["photos/a", "photos/e.x", "photos/sub/a", "photos/sub/deep/b"]
    assert items["photos/sub/a"].file == str(root / "sub/a.webp")
    assert items["photos/e.x"].caption_path == str(root / "e.x.txt")
    assert ignored == {"(hidden)": 1, ".npz": 1, "(none)": 1, "(link to a folder that was visited)": 1}


def test_names_stay_when_a_source_is_added() -> None:
    paths = ["/x/photos", "/y/photos", "/z/other", "/w/photos"]
    sources = tuple(FolderSource(path=Path(path)) for path in paths)
    assert source_names(sources) == ("photos", "photos~2", "other", "photos~3")
    assert source_names(sources[:2]) == source_names(sources)[:2]


def test_captions(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    assert caption_text(read_caption(str(path)).record) == ""
    path.write_bytes('\ufeff a "cat",\n1girl ☕ \n'.encode())
    assert caption_text(read_caption(str(path)).record) == 'a "cat",\n1girl ☕'
    path.write_bytes(b"caf\xe9")
    assert caption_text(read_caption(str(path)).record) == "café"


def test_caption_files_of_tags(tmp_path: Path) -> None:
    for name in ("10_sks girl/a.jpg", "10_sks girl/b.jpg", "10_sks girl/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1girl, solo")
    records = {}
    for kohya in (False, True):
        source = FolderSource(path=tmp_path, caption_files_hold="tags", kohya_repeats=kohya)
        items = list_folder(source, "x", Counter())
        records[kohya] = sorted(read_caption(item.caption_path, item.caption).record for item in items)
    assert records[False] == ['{"caption":"","tags":"1girl, solo"}', '{"caption":""}']
    assert records[True] == ['{"caption":"","tags":"1girl, solo"}', '{"caption":"","tags":"sks girl"}']


def test_a_missing_folder_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        list(list_folder(FolderSource(path=tmp_path / "nope"), "nope", Counter()))


def test_kohyas_layout(tmp_path: Path) -> None:
    root = tmp_path / "train"
    for name in (
        "10_sks girl/a.png",
        "10_sks girl/sub/b.png",
        "10_sks girl/a.txt",
        "3_x/a.png",
        "other/c.png",
        "d.png",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("a caption")
    ignored: Counter[str] = Counter()
    items = {
        item.key: item for item in list_folder(FolderSource(path=root, kohya_repeats=True, repeats=2), "t", ignored)
    }
    assert {key: item.repeats for key, item in items.items()} == {
        "t/10_sks girl/a": 20,
        "t/10_sks girl/sub/b": 20,
        "t/3_x/a": 6,
    }
    captions = {key: caption_text(read_caption(item.caption_path, item.caption).record) for key, item in items.items()}
    assert captions == {"t/10_sks girl/a": "a caption", "t/10_sks girl/sub/b": "sks girl", "t/3_x/a": "x"}
    assert ignored == {"(outside of <repeats>_<words> folders)": 2}

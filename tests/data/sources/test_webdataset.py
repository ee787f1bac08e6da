"""WebDataset tars: samples, captions by rank, what is passed over, and damaged tars. `tarfile` writes them."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from skimage import data

from trainer.config.sections.data.sources import WebdatasetSource
from trainer.data.sources.columns import files_below
from trainer.data.sources.source import SourceItem, read_bytes
from trainer.data.sources.webdataset import list_webdataset
from trainer.errors import UserError


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG")
    return file.getvalue()


ASTRONAUT = _jpeg(Image.fromarray(data.astronaut()))
COFFEE = _jpeg(Image.fromarray(data.coffee()))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """The members in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1_700_000_000
            tar.addfile(info, io.BytesIO(content))


def _list(source: WebdatasetSource) -> tuple[dict[str, SourceItem], Counter[str]]:
    ignored: Counter[str] = Counter()
    items = list(list_webdataset(source, "web", ignored))
    assert len({item.key for item in items}) == len(items)
    return {item.key: item for item in items}, ignored


def test_samples_captions_and_what_is_passed_over(tmp_path: Path) -> None:
    write_tar(
        tmp_path / "tars/00.tar",
        {
            "000.jpg": ASTRONAUT,
            "000.txt": "an astronaut ☕\n".encode(),
            "000.json": json.dumps({"caption": "not this", "tags": ["1girl", " solo "], "width": 512}).encode(),
            "001.json": json.dumps({"caption": "coffee", "tags": "cup, table"}).encode(),
            "001.JPG": COFFEE,
            "002.caption": b"\xef\xbb\xbfwith a mark",
            "002.png": COFFEE,
            "003.webp": COFFEE,
            "deep/000.image.jpg": COFFEE,
            "deep/000.cls": b"7",
            "004.txt": b"no image",
            "005.jpg": COFFEE,
            "005.png": COFFEE,
            "._006.jpg": b"of macOS",
        },
    )
    write_tar(tmp_path / "tars/sub/00.tar", {"000.jpg": COFFEE})
    items, ignored = _list(WebdatasetSource(type="webdataset", tars=tmp_path / "tars", repeats=3))
    records = {key: json.loads(item.caption or "") for key, item in items.items()}
    captions = {key: {name: text for name, text in record.items() if text} for key, record in records.items()}
    assert captions == {
        "web/00/000": {"caption": "an astronaut ☕", "tags": "1girl, solo"},
        "web/00/001": {"caption": "coffee", "tags": "cup, table"},
        "web/00/002": {"caption": "with a mark"},
        "web/00/003": {},
        "web/00/deep/000": {},
        "web/00/005": {},
        "web/sub/00/000": {},
    }
    assert ignored == {
        ".cls": 1,
        "(caption without image)": 1,
        "(further image of a sample)": 1,
        "(hidden)": 1,
    }
    for key, content in (("web/00/000", ASTRONAUT), ("web/00/001", COFFEE), ("web/sub/00/000", COFFEE)):
        item = items[key]
        assert read_bytes(item.file, item.offset, item.length) == content
        assert (item.file_bytes, item.mtime_ns, item.repeats) == (len(content), 1_700_000_000 * 10**9, 3)


def test_fields_of_other_names(tmp_path: Path) -> None:
    fields = json.dumps({"prompt": "a cup", "labels": ["cup"], "caption": None}).encode()
    write_tar(tmp_path / "a.tar", {"0.jpg": COFFEE, "0.json": fields})
    items, _ = _list(
        WebdatasetSource(type="webdataset", tars=tmp_path / "*.tar", caption_field="prompt", tags_field="labels")
    )
    assert json.loads(items["web/a/0"].caption or "") == {"caption": "a cup", "tags": "cup"}


def test_damage_costs_what_it_touches(tmp_path: Path) -> None:
    members = {"0.jpg": COFFEE, "0.txt": b"zero", "1.jpg": COFFEE, "1.json": b"{no json", "2.jpg": COFFEE}
    write_tar(tmp_path / "a.tar", members)
    write_tar(tmp_path / "b.tar", {"0.jpg": ASTRONAUT})
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.rindex(COFFEE) + 1000])
    items, _ = _list(WebdatasetSource(type="webdataset", tars=tmp_path))
    problems = {key: item.problem for key, item in items.items()}
    assert problems.pop("web/a/").startswith("byte ")
    assert problems.pop("web/a/1").startswith("its caption cannot be read")
    assert problems == {"web/a/0": "", "web/b/0": ""}


def test_an_empty_image_is_told_without_a_look_at_it(tmp_path: Path) -> None:
    """A header of 512 bytes makes one: a small tar may hold any number of them."""
    write_tar(tmp_path / "a.tar", {"0.jpg": b"", "0.txt": b"a cup", "1.jpg": COFFEE})
    items, _ = _list(WebdatasetSource(type="webdataset", tars=tmp_path))
    assert [item.problem for item in items.values()] == ["is empty", ""]


def test_which_files(tmp_path: Path) -> None:
    for name in ("x/0.tar", "x/1.tar", "y/0.tar", "y/1.txt"):
        write_tar(tmp_path / name, {"0.jpg": COFFEE})
    assert [stem for _, stem in files_below(tmp_path, ".tar", "tars", Counter())] == ["x/0", "x/1", "y/0"]
    assert [stem for _, stem in files_below(tmp_path / "*" / "0.tar", ".tar", "tars", Counter())] == ["x/0", "y/0"]
    assert [stem for _, stem in files_below(tmp_path / "x" / "1.tar", ".tar", "tars", Counter())] == ["1"]
    with pytest.raises(UserError, match=r"there is no \.tar file"):
        files_below(tmp_path / "z", ".tar", "tars", Counter())

"""What strangers put into sources: refused with the reason, at once, and what lies beside it is taken."""

import io
import json
import os
import stat
import struct
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.data.kohya_files import write_tar
from tests.hostile_sources import EPS, encoded
from tests.hostile_tables import MEMBERS, variant
from trainer.config.sections.data.sources import FolderSource, ParquetSource, WebdatasetSource
from trainer.data.images import BadImage, image_hw
from trainer.data.sources.columns import files_below
from trainer.data.sources.folder import list_folder
from trainer.data.sources.metadata import read_metadata
from trainer.data.sources.parquet import list_parquet
from trainer.data.sources.parquet_pages import check_pages
from trainer.data.sources.sidecars import BadCaption, read_caption
from trainer.data.sources.webdataset import list_webdataset
from trainer.errors import UserError
from trainer.guards import Limits, Refused


def test_no_image_starts_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow takes EPS by its content, and decodes it with ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "a.jpg").write_bytes(EPS)
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "EPS"  # it is one that Pillow would take
    with pytest.raises(BadImage, match=r"is not an image of a known kind \(JPEG, PNG"):
        image_hw(tmp_path / "a.jpg")
    assert not (tmp_path / "ran").exists()


def test_captions_are_regular_files_of_a_bounded_size(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "long.txt").write_text("x" * 101)
    reasons = {
        "fifo.txt": "its caption is a FIFO, not a regular file",
        "zero.txt": "its caption is a device, not a regular file",
        "long.txt": "its caption has 101 bytes; at most 100 are read",
    }
    for name, reason in reasons.items():
        with pytest.raises(BadCaption) as caught:
            read_caption(str(tmp_path / name), most_bytes=100)
        assert str(caught.value) == reason
    assert read_caption(str(tmp_path / "none.txt")).record == '{"caption":""}'


def test_each_folder_is_visited_once(tmp_path: Path) -> None:
    """Also where thirty folders link to one another, and the real one has the name, not the link that sorts first."""
    for n in range(30):
        (tmp_path / f"set/f{n}").mkdir(parents=True)
        (tmp_path / f"set/f{n}/a.png").write_bytes(b"")
        for m in range(30):
            (tmp_path / f"set/f{n}/a{m}").symlink_to(f"../f{m}")
    (tmp_path / "set/0").symlink_to("0")
    (tmp_path / "set/out").symlink_to(tmp_path / "beyond")
    (tmp_path / "beyond").mkdir()
    (tmp_path / "beyond/b.png").write_bytes(b"")
    ignored: Counter[str] = Counter()
    keys = [item.key for item in list_folder(FolderSource(path=tmp_path / "set"), "s", ignored)]
    assert sorted(keys) == sorted([*(f"s/f{n}/a" for n in range(30)), "s/out/b"])
    assert ignored["(link to a folder that was visited)"] == 900


def test_folders_deeper_than_the_limit_are_told(tmp_path: Path) -> None:
    deep = tmp_path / "1/2/3/4"
    deep.mkdir(parents=True)
    for folder in (deep, deep.parent):
        (folder / "a.png").write_bytes(b"")
    ignored: Counter[str] = Counter()
    items = list(list_folder(FolderSource(path=tmp_path), "s", ignored, Limits(folder_depth=3)))
    assert [item.key for item in items] == ["s/1/2/3/a"]
    assert ignored == {"(folder deeper than limits.folder_depth = 3)": 1}


def test_patterns_of_any_folders_end(tmp_path: Path) -> None:
    for name in ("a/b/1.tar", "a/2.tar", "3.tar", "a/b/c.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for n in range(20):
        (tmp_path / f"a/b/up{n}").symlink_to("../..")
    found = files_below(tmp_path / "**" / "*.tar", ".tar", "tars", Counter())
    assert [stem for _, stem in found] == ["3", "a/2", "a/b/1"]
    assert [stem for _, stem in files_below(tmp_path / "a" / "**" / "1.tar", ".tar", "tars", Counter())] == ["b/1"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a":' + "[" * 10**5, "holds more than 64 levels inside one another, near byte 0"),
        ('{"b":{},"a":{"caption":"' + "x" * 400_000, "a text or number of more than 100,000 bytes"),
        ('{"b":{},"a":{"tags":[' + '"\\"[{",' * 200_000, "an entry of more than 400,000 bytes"),
        ('{"a":{"image_size":[' + "9" * 5000, "is not valid JSON"),
    ],
)
def test_metadata_is_bounded(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(UserError, match=reason):
        list(read_metadata(tmp_path / "meta.json", limits=Limits(caption_bytes=100_000)))


def test_metadata_of_any_length_and_with_any_marks_in_its_texts_is_read(tmp_path: Path) -> None:
    marks = ['"', "\\", '\\"', "[{" * 50, "]}" * 50, '\\\\"[', "\u2028", "\\u005b"]
    entries = {f"{n}/{marks[n % 8]}": {"caption": "".join(marks[: n % 9]), "tags": ["[", '"']} for n in range(20_000)}
    (tmp_path / "meta.json").write_text(json.dumps(entries, indent=1))
    found = list(read_metadata(tmp_path / "meta.json", limits=Limits(caption_bytes=2000, json_depth=3)))
    assert [entry.key for entry in found] == list(entries) and not any(entry.problem for entry in found)


def test_a_line_of_metadata_costs_itself(tmp_path: Path) -> None:
    lines = ["[" * 10**5, '{"image_path":"a","caption":"' + "x" * 10**6 + '"}', '{"image_path":"b"}']
    (tmp_path / "meta.jsonl").write_text("\n".join(lines))
    found = list(read_metadata(tmp_path / "meta.jsonl", limits=Limits(caption_bytes=100_000)))
    assert [entry.key for entry in found] == ["line 1", "line 2", "b"]
    assert found[0].problem.startswith("is not valid JSON") and found[1].problem.startswith("has more than 400,000")


@pytest.mark.parametrize("number", range(len(MEMBERS)))
def test_a_member_of_a_tar_costs_itself(tmp_path: Path, number: int) -> None:
    sound = encoded("PNG")
    for name in ("first", "last"):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": sound})
    block = 512 + -(-len(sound) // 512) * 512
    odd = variant(MEMBERS, Random(0), number)
    data = [(tmp_path / f"{name}.tar").read_bytes() for name in ("first", "last")]
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a.tar").write_bytes(data[0][:block] + odd + data[1])
    items = list(list_webdataset(WebdatasetSource(type="webdataset", tars=tmp_path / "set"), "s", Counter()))
    taken = {item.key for item in items if not item.problem}
    assert {"s/a/first", "s/a/last"} <= taken
    if number in (0, 1, 4, 5, 6, 8):
        assert [item for item in items if item.problem], "what is odd is told"


def _table(path: Path, *images: bytes) -> pq.ParquetFile:
    pq.write_table(pa.table({"image": list(images), "caption": ["a"] * len(images)}), path, compression="zstd")
    return pq.ParquetFile(path)


def test_pages_are_judged_before_they_are_unpacked(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "a.parquet"
    with _table(path, *(rng.bytes(30_000) for _ in range(900))) as file:
        check_pages(str(path), file.metadata.row_group(0), ["image", "caption"])
    with _table(path, bytes(40_000_000)) as file, pytest.raises(Refused, match=r"unpacks from .* to 40,000,00"):
        check_pages(str(path), file.metadata.row_group(0), ["image"])


def test_a_page_that_lies_is_told(tmp_path: Path) -> None:
    """Its header says 128 MiB, whatever the footer says."""
    (tmp_path / "set").mkdir()
    path = tmp_path / "set/a.parquet"
    _table(path, *(bytes([n]) * 40_000 for n in range(60))).close()
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(0).column(0).dictionary_page_offset
    assert data[start : start + 2] == b"\x15\x04" and data[start + 2] == 0x15  # the type; then the size, as a varint
    at = start + 3
    while data[at] > 127:
        at += 1
    data[start + 3 : at + 1] = b"\xfe" + b"\xff" * (at - start - 4) + b"\x7f"
    path.write_bytes(data)
    (item,) = list_parquet(ParquetSource(type="parquet", files=path.parent), "s", Counter())
    assert "unpacks from" in item.problem


def test_a_tiff_of_very_many_numbers_is_refused(tmp_path: Path) -> None:
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (273, 4, 25_000_000, 8)]
    data = b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    for file in (data + bytes(100), io.BytesIO(data + bytes(100))):
        with pytest.raises(BadImage, match="a TIFF whose tag 273 has 25,000,000 values"):
            image_hw(file)

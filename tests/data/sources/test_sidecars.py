"""What lies beside an image: captions in any encoding, JSON, tags; told, noticed when it changes, and never trusted."""

import json
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.data.kohya_files import write_files, write_tar
from tests.data.photographs import pooled, settings_for, write_crops
from trainer.cli.prepare_messages import describe_plan
from trainer.config.sections.data.sources import FolderSource, WebdatasetSource
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import PrepareCounts, plan_prepare
from trainer.data.sources.columns import captions_of
from trainer.data.sources.sidecars import BadCaption, JsonFields, Sidecars, read_caption
from trainer.data.store.snapshot import PreparedSet
from trainer.guards import Refused, decode_text

TEXT = "ein Café — “schön”, 5 €"
ENCODINGS = {
    "utf-8": "UTF-8",
    "utf-8-sig": "UTF-8",
    "utf-16": "UTF-16",
    "utf-32": "UTF-32",
    "cp1252": "Windows-1252",
}
JSON = Sidecars(".json", JsonFields(weight="weight"))
BOTH = Sidecars(".json", JsonFields(), ".tags")


@pytest.mark.parametrize(("codec", "told"), ENCODINGS.items())
def test_every_encoding_is_read_as_it_was_meant(codec: str, told: str) -> None:
    assert decode_text(TEXT.encode(codec), "a.txt") == (TEXT, told)


def test_big_endians_latin_1_and_what_is_no_text() -> None:
    assert decode_text(b"\xfe\xff" + TEXT.encode("utf-16-be"), "") == (TEXT, "UTF-16")
    assert decode_text(b"\0\0\xfe\xff" + TEXT.encode("utf-32-be"), "") == (TEXT, "UTF-32")
    assert decode_text("café Ñandú ÿ".encode("latin-1"), "").text == "café Ñandú ÿ"
    assert decode_text(b"", "") == ("", "UTF-8")
    for data, reason in {
        b"a \x81": r"is neither UTF-8 nor Windows-1252 \(byte 0x81 at 2\)",
        b"\xff\0": r"is neither UTF-8 nor Windows-1252 \(byte 0x00 at 1\)",
        b"\xff\xfea": r"bears the mark of UTF-16, but is none",
        b"\xff\xfe\x00\xd8": r"bears the mark of UTF-16, but is none",
    }.items():
        with pytest.raises(Refused, match=f"^a.txt: {reason}.*; save it as UTF-8$"):
            decode_text(data, "a.txt")


def test_no_text_of_bytes_gives_a_replaced_character() -> None:
    for seed in range(300):
        data = np.random.default_rng(seed).bytes(seed % 40)
        try:
            text = decode_text(data, "").text
        except Refused:
            continue
        assert "\ufffd" not in text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        (" a cat ", "a cat"),
        (["a cat", " a pet\nat home ", ""], "a cat\na pet at home"),
        ([{"text": "a cat", "weight": 2}, "a pet"], (("a cat", 2.0), ("a pet", 1.0))),
        ([{"text": "a cat", "weight": 2}, {"text": "", "weight": 3}], "a cat"),
        ([{"text": "a", "model": "x"}, {"text": "b", "weight": 1.0}], "a\nb"),
        ([], ""),
    ],
)
def test_several_captions(value: object, expected: object) -> None:
    assert captions_of(value) == expected


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (5, "its caption is neither text nor a list"),
        ([["a"]], "neither text nor an object with `text` and `weight`"),
        ([{"weight": 2}], "neither text nor an object"),
        ([{"text": "a", "weight": 0}], "is '0', not a number above 0 and at most 1000"),
        ([{"text": "a", "weight": True}], "is 'True'"),
        ([{"text": "a", "weight": "2"}], "is '2'"),
    ],
)
def test_what_are_no_captions(value: object, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        captions_of(value)


def _record(folder: Path, sidecars: Sidecars, default: str | None = None, **files: bytes) -> dict:
    write_files(folder, {f"a.{ending}": data for ending, data in files.items()})
    return json.loads(read_caption(str(folder / "a.json"), default, 10_000, sidecars).record)


def test_json_and_tags(tmp_path: Path) -> None:
    fields = {"caption": "one", "captions": ["b", {"text": "c", "weight": 3}], "tags": ["x", " y "], "weight": 0.5}
    found = _record(tmp_path / "1", JSON, json=json.dumps(fields).encode())
    assert found == {"captions": [["b", 1.0], ["c", 3.0]], "tags": "x, y", "loss_weight": 0.5}
    del fields["captions"]
    found = _record(tmp_path / "2", BOTH, json=json.dumps(fields).encode("utf-16"), tags="1girl,\nsolo, é\n".encode())
    assert found == {"caption": "one", "tags": "1girl, solo, é"}
    assert _record(tmp_path / "3", BOTH, tags=b"1girl, solo") == {"caption": "", "tags": "1girl, solo"}
    words = '{"caption":"sks girl","loss_weight":2.0}'
    assert _record(tmp_path / "4", BOTH, words) == {"caption": "sks girl", "loss_weight": 2.0}
    other = Sidecars(".json", JsonFields("text", None, "labels"))
    assert _record(tmp_path / "5", other, json=b'{"text": "t", "labels": "l"}') == {"caption": "t", "tags": "l"}


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 30)


def _holding(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


HOSTILE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "fifo": ("a.json", _fifo, "its caption is a FIFO, not a regular file"),
    "fifo of tags": ("a.tags", _fifo, "its caption (a.tags) is a FIFO, not a regular file"),
    "huge": ("a.json", _huge, "its caption has 1,073,741,824 bytes; at most 10,000 are read"),
    "huge tags": ("a.tags", _huge, "its caption (a.tags) has 1,073,741,824 bytes; at most 10,000 are read"),
    "nested": ("a.json", _holding(b"[" * 5000), "its caption its JSON is nested more than 64 levels deep"),
    "twice": ("a.json", _holding(b'{"a":1,"a":2}'), "its caption not valid JSON (the name a stands twice in it)"),
    "a list": ("a.json", _holding(b"[]"), "its caption is no JSON object"),
    "text": ("a.json", _holding(b"a cat"), "its caption not valid JSON (Expecting value: line 1 column 1 (char 0))"),
    "half a character": ("a.json", _holding(b'{"caption":"\\ud800"}'), "its caption holds half a character"),
    "tags": ("a.json", _holding(b'{"tags":{"a":1}}'), "its tags are neither text nor a list of texts"),
    "no text": (
        "a.tags",
        _holding(b"a\x81"),
        "its caption (a.tags) is neither UTF-8 nor Windows-1252 (byte 0x81 at 1); save it as UTF-8",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_told_in_one_line(name: str, tmp_path: Path) -> None:
    file, make, reason = HOSTILE[name]
    make(tmp_path / file)
    with pytest.raises(BadCaption) as caught:
        read_caption(str(tmp_path / "a.json"), None, 10_000, BOTH)
    assert str(caught.value) == reason


def _prepare(settings: PrepareSettings) -> tuple[PrepareCounts, dict[str, dict]]:
    counts = plan_prepare(settings, show_progress=False)
    encode_shards(settings.prepared, 0, 1, pooled)
    commit(settings.prepared)
    opened, found = PreparedSet.open(settings.prepared), {}
    for bucket, count in enumerate(opened.rows_per_bucket("train")):
        rows = opened.read("train", bucket, np.arange(count))
        assert rows.ok.all()
        found |= dict(zip((key.rpartition("/")[2] for key in rows.keys), map(json.loads, rows.captions), strict=True))
    return counts, found


def test_prepare_tells_what_is_not_utf_8_and_mends_sets_of_before(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_crops(photos, 6)
    names = [f"crop-0-{i:03d}" for i in range(6)]
    write_files(
        photos,
        {
            f"{names[0]}.txt": "café".encode("latin-1"),
            f"{names[1]}.txt": "schön".encode("cp1252"),
            f"{names[2]}.txt": TEXT.encode("utf-16"),
            f"{names[3]}.txt": "a \ufffd b".encode(),
            f"{names[4]}.txt": b"\x81\x8d",
        },
    )
    settings = settings_for(tmp_path / "prepared", photos)
    counts, found = _prepare(settings)
    assert [found[name]["caption"] for name in names[:4]] == ["café", "schön", TEXT, "a \ufffd b"]
    assert names[4] not in found and counts.scan.bad == 1
    lines = describe_plan(counts, tmp_path)
    assert f"1 caption is not UTF-8, read as UTF-16, such as {photos}/{names[2]}.txt" in lines
    assert any(line.startswith(f"2 captions are not UTF-8, read as Windows-1252, such as {photos}/") for line in lines)
    lossy = f"1 caption holds U+FFFD, in place of characters that were lost before, such as {photos}/{names[3]}.jpg's"
    assert lossy in lines
    # As an earlier version had it, with the same time of the file.
    with sqlite3.connect(settings.prepared / "catalog.sqlite") as connection:
        connection.execute("UPDATE rows SET caption = replace(caption, 'é', '\ufffd') WHERE key LIKE '%-000'")
    connection.close()
    counts, _ = _prepare(settings)
    assert (counts.scan.captions, counts.scan.known, counts.scan.new) == (1, 5, 0)
    assert lossy in describe_plan(counts, tmp_path)
    with sqlite3.connect(settings.prepared / "catalog.sqlite") as connection:
        mended = connection.execute("SELECT caption FROM rows WHERE key LIKE '%-000'").fetchone()
        assert mended == ('{"caption":"café"}',)
    connection.close()


def test_a_change_of_any_file_beside_an_image_is_noticed(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_crops(photos, 3)
    names = [f"crop-0-{i:03d}" for i in range(3)]
    for name in names:
        write_files(photos, {f"{name}.json": json.dumps({"caption": name, "tags": "old", "other": "o"}).encode()})
    source = FolderSource(path=photos, caption_extension=".json", tags_extension=".tags")
    counts, found = _prepare(settings_for(tmp_path / "prepared", sources=(source,)))
    assert found == {name: {"caption": name, "tags": "old"} for name in names} and counts.scan.ignored == {".txt": 3}
    assert plan_prepare(settings_for(tmp_path / "prepared", sources=(source,)), show_progress=False).scan.captions == 0
    (photos / f"{names[0]}.tags").write_text("new, é", encoding="cp1252")
    (photos / f"{names[1]}.json").write_text('{"captions": [{"text": "a", "weight": 2}, "b"]}')
    counts, found = _prepare(settings_for(tmp_path / "prepared", sources=(source,)))
    assert (counts.scan.captions, counts.scan.new, counts.scan.changed) == (2, 0, 0)
    assert found[names[0]] == {"caption": names[0], "tags": "new, é"}
    assert found[names[1]] == {"captions": [["a", 2.0], ["b", 1.0]]}
    told = f"1 caption is not UTF-8, read as Windows-1252, such as {photos}/{names[0]}.tags"
    assert told in describe_plan(counts, tmp_path)
    os.utime(photos / f"{names[0]}.tags", (1, 1))  # touched alone
    assert plan_prepare(settings_for(tmp_path / "prepared", sources=(source,)), show_progress=False).scan.captions == 0
    (photos / f"{names[0]}.tags").unlink()
    other = source.model_copy(update={"caption_field": "other"})  # another field of the same files
    counts, found = _prepare(settings_for(tmp_path / "prepared", sources=(other,)))
    assert counts.scan.captions == 2 and found[names[0]] == {"caption": "o", "tags": "old"}


def test_members_of_tars_are_decoded_by_the_same_rule(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_crops(photos, 4)
    images = [(photos / f"crop-0-{i:03d}.jpg").read_bytes() for i in range(4)]
    several = {"captions": [{"text": "x", "weight": 3}, "y"], "caption": "z"}
    write_tar(
        tmp_path / "wds/0.tar",
        {
            **{"0.jpg": images[0], "0.txt": "café".encode("latin-1")},
            **{"1.jpg": images[1], "1.json": json.dumps(several).encode()},
            **{"2.jpg": images[2], "2.json": '{"caption": "é"}'.encode("utf-16")},
            **{"3.jpg": images[3], "3.txt": b"\x81"},
        },
    )
    source = WebdatasetSource(type="webdataset", tars=tmp_path / "wds")
    counts, found = _prepare(settings_for(tmp_path / "prepared", sources=(source,)))
    assert found == {"0": {"caption": "café"}, "1": {"caption": "z"}, "2": {"caption": "é"}}
    assert f"1 caption is not UTF-8, read as UTF-16, such as 2.json in {tmp_path}/wds/0.tar" in describe_plan(
        counts, tmp_path
    )
    (line,) = (settings_for(tmp_path / "prepared").prepared / "bad.jsonl").read_text().splitlines()
    reason = "its caption cannot be read: 3.txt: is neither UTF-8 nor Windows-1252 (byte 0x81 at 0); save it as UTF-8"
    assert json.loads(line)["reason"] == reason
    other = source.model_copy(update={"captions_field": "captions"})
    counts, found = _prepare(settings_for(tmp_path / "prepared", sources=(other,)))
    assert counts.scan.captions == 1 and found["1"] == {"captions": [["x", 3.0], ["y", 1.0]]}

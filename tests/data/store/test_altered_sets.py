"""Prepared sets that somebody else has written: whatever they hold, it is one line or a bad row."""

import json
import random
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c

from tests.data.small_set import write_small_set
from trainer.data.buckets import Bucket
from trainer.data.catalog.settings import stored_settings
from trainer.data.store.shards import HEADER_BYTES, ShardError, read_info
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.browse.left_out_list import left_out_by_reason
from trainer.errors import UserError

BUCKET = Bucket(64, 64)
DEEP = "[" * 200_000
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1 << 62,
    10**30,
    1.5,
    "",
    "\x1b[31m",
    [],
    [1],
    {},
    {"a": 1},
    [[]] * 3,
    "9" * 5000,
]


def _read_all(folder: Path) -> None:
    """As a run reads: every row, its captions, and what the set as a whole tells."""
    prepared = PreparedSet.open(folder)
    assert prepared.scaling_factor and not prepared.has_masks
    for bucket, count in enumerate(prepared.rows_per_bucket("train")):
        if count > 1000:  # claimed by virtual rows alone
            count = 1000
        rows = prepared.read("train", bucket, np.arange(count))
        assert all(str(problem).isprintable() for problem in rows.problems)
    for shard in prepared.shards("train"):
        with suppress(ShardError, OSError):
            prepared.read_captions(shard)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Of every value within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, part in inner for place in _places(part, (*path, key)))]


def _altered(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return copy


def test_any_altered_value_of_a_snapshot_is_one_line_or_a_bad_row(tmp_path: Path) -> None:
    folder = write_small_set(tmp_path / "set", {BUCKET: 7})
    path = folder / "snapshots/000001.json"
    document = json.loads(path.read_text())
    draw = random.Random(0)
    refused = 0
    places = _places(document)
    for place in places:
        for value in [..., *draw.sample(VALUES, 6)] if place else VALUES:
            path.write_text(json.dumps(_altered(document, place, value)))
            try:
                _read_all(folder)
            except UserError as error:
                refused += 1
                assert len(error.lines) == 1 and error.lines[0].isprintable() and str(path) in error.lines[0]
    assert refused > 3 * len(places)


@pytest.mark.parametrize("text", [DEEP, '{"a":' * 70 + "1", '"' + "x" * 1000, "\xff", "", "{}", '{"format": "\x1b"}'])
def test_a_snapshot_that_is_none(tmp_path: Path, text: str) -> None:
    folder = write_small_set(tmp_path / "set", {BUCKET: 3})
    (folder / "snapshots/000001.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as error:
        PreparedSet.open(folder)
    assert len(error.value.lines) == 1 and "000001.json" in error.value.lines[0]


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "", "000001.json\n000002.json", "\x1b", "x" * 5000]
)
def test_current_names_a_snapshot_of_the_set_or_is_refused(tmp_path: Path, name: str) -> None:
    folder = write_small_set(tmp_path / "set", {BUCKET: 3})
    (folder / "CURRENT").write_text(name)
    with pytest.raises(UserError, match="CURRENT: "):
        PreparedSet.open(folder)


def _with_header(data: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    header = change(json.loads(data[8:HEADER_BYTES]))
    text = header if isinstance(header, str) else json.dumps(header)
    return data[:8] + text.encode().ljust(HEADER_BYTES - 8)[: HEADER_BYTES - 8] + data[HEADER_BYTES:]


def test_any_altered_value_of_a_shards_header_is_damage(tmp_path: Path) -> None:
    folder = write_small_set(tmp_path / "set", {BUCKET: 3})
    (path,) = folder.glob("*.safetensors")
    data, told = path.read_bytes(), read_info(path)
    header = json.loads(data[8:HEADER_BYTES])
    draw = random.Random(0)
    found = 0
    for place in _places(header):
        for value in [..., *draw.sample(VALUES, 5)] if place else [*VALUES, DEEP]:
            path.write_bytes(_with_header(data, lambda old, p=place, v=value: v if v is DEEP else _altered(old, p, v)))
            try:
                info = read_info(path)
                assert info.rows <= told.file_bytes and info.virtual_rows < 1 << 48
            except ShardError as error:
                found += 1
                assert str(error).isprintable() and len(str(error)) < 500
    assert found > 100


def _shard_with_caption(folder: Path, caption: bytes, key: bytes | None = None) -> None:
    """The first row of the set's one shard gets this caption (and key) of the same length; checksums are put right."""
    (path,) = folder.glob("*.safetensors")
    data = bytearray(path.read_bytes())
    offsets = read_info(path).offsets
    begin, end = struct.unpack_from("<2Q", data, offsets["caption_offsets"])
    place = offsets["caption_bytes"] + begin
    assert len(caption) == end - begin
    data[place : place + len(caption)] = caption
    key_begin, key_end = struct.unpack_from("<2Q", data, offsets["key_offsets"])
    key_place = offsets["key_bytes"] + key_begin
    if key is not None:
        data[key_place : key_place + key_end - key_begin] = key
    parts = caption, data[key_place : key_place + key_end - key_begin], data[offsets["sizes"] :][:24]
    checksum = crc32c(b"".join((*parts, data[offsets["repeats"] :][:4])))
    struct.pack_into("<I", data, offsets["meta_crc32c"], checksum)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "caption", ["[" * 40, '{"caption": 1, "tags": []}', '{"caption":"\xff"}', "no JSON", '"x"', '{"a":[]}']
)
def test_a_record_that_is_none_is_a_bad_row(tmp_path: Path, caption: str) -> None:
    data = caption.encode("latin-1")
    record = b'{"caption":"' + b"x" * 60 + b'"}'
    folder = write_small_set(tmp_path / "set", {BUCKET: 3}, record=lambda i: record)
    _shard_with_caption(folder, record)
    assert PreparedSet.open(folder).read("train", 0, np.arange(3)).ok.all()
    _shard_with_caption(folder, data.ljust(len(record)))
    rows = PreparedSet.open(folder).read("train", 0, np.arange(3))
    assert rows.ok.tolist() == [False, True, True] and "record of a caption" in rows.problems[0].reason


def test_a_key_that_is_no_text_is_a_bad_row(tmp_path: Path) -> None:
    folder = write_small_set(tmp_path / "set", {BUCKET: 3})
    _shard_with_caption(folder, b'{"caption":"photo 0"}', b"\xff" * len("64x64/0"))
    rows = PreparedSet.open(folder).read("train", 0, np.arange(3))
    assert rows.ok.tolist() == [False, True, True] and "no Unicode text" in rows.problems[0].reason


SETTINGS: dict[str, Any] = {
    "data.sources": [{"path": "/photos"}],
    "data.rows_per_shard": 16,
    "data.buckets.resolution": 1024,
    "data.cache_text": False,
    "the VAE's scaling_factor": 0.13,
    "the VAE (weights and model.vae_precision)": "xxh3:00 fp32",
}


@pytest.mark.parametrize("place", _places(SETTINGS)[1:], ids=str)
def test_altered_settings_are_one_line(tmp_path: Path, place: tuple[Any, ...]) -> None:
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    assert stored_settings(tmp_path) == SETTINGS
    for value in VALUES:
        (tmp_path / "settings.json").write_text(json.dumps(_altered(SETTINGS, place, value)))
        try:
            stored_settings(tmp_path)
        except UserError as error:
            assert len(error.lines) == 1
            assert "settings.json: was altered" in str(error) or "not valid JSON" in str(error)
    (tmp_path / "settings.json").write_text(DEEP)
    with pytest.raises(UserError, match="nested more than"):
        stored_settings(tmp_path)


def test_a_list_of_bad_images_that_holds_anything(tmp_path: Path) -> None:
    lines = ['{"reason": "is empty"}', "no JSON", "[]", DEEP, '{"reason": 5}', '{"reason": "\\u001b[31m 12"}']
    (tmp_path / "bad.jsonl").write_text("\n".join(lines) + "\n")
    found = {each.reason: each.images for each in left_out_by_reason(tmp_path)}
    assert found == {"is empty": 1, "(a line that cannot be read)": 4, "\\xNb[Nm N": 1}

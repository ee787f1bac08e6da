"""kohya's metadata as a stream: whatever may be missing, whatever may be wrong with one entry or the whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.kohya_files import entry, write_metadata
from trainer.data.sources.metadata import MetadataEntry, read_metadata
from trainer.errors import UserError


def _read(tmp_path: Path, text: str | bytes, name: str = "meta.json") -> list[MetadataEntry]:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(read_metadata(path))


def test_entries_as_kohya_writes_them(tmp_path: Path) -> None:
    entries = {"danbooru/1": entry(1, (1216, 832), image_size=[1000, 1300]), "ü ☕": {"tags": "x"}, "n": {}}
    write_metadata(tmp_path / "meta.json", entries)
    assert list(read_metadata(tmp_path / "meta.json")) == [
        MetadataEntry("danbooru/1", '{"caption":"a picture of 1","tags":"tag1, solo"}', (1300, 1000), (1216, 832), ""),
        MetadataEntry("ü ☕", '{"caption":"","tags":"x"}', None, None, ""),
        MetadataEntry("n", '{"caption":""}', None, None, ""),
    ]


def test_sizes_are_rounded_down_to_latents(tmp_path: Path) -> None:
    (found,) = _read(tmp_path, '{"a": {"train_resolution": [839, 1216], "caption": null}}')
    assert found == MetadataEntry("a", '{"caption":""}', None, (1216, 832), "")


def test_lines(tmp_path: Path) -> None:
    lines = [
        '{"image_path": "a/b.jpg", "caption": " a girl \\n", "tags": "1girl", "image_size": [300, 200]}',
        "",
        "{broken",
        '{"caption": "of what?"}',
        "[1]",
        '{"image_path": "half", "caption": "half \\ud83d"}',
    ]
    found = _read(tmp_path, "\n".join(lines), "meta.jsonl")
    assert found[0] == MetadataEntry("a/b.jpg", '{"caption":"a girl","tags":"1girl"}', (200, 300), None, "")
    assert [(e.key, e.problem.split(" (")[0]) for e in found[1:4]] == [
        ("line 3", "is not valid JSON"),
        ("line 4", "has no image_path"),
        ("line 5", "has no image_path"),
    ]
    assert found[4].caption == '{"caption":"half ?"}'


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ("5", "its metadata is no JSON object"),
        ('{"caption": 5}', "a caption that is no text"),
        ('{"tags": {"a": 1}}', "a tags that is no text"),
        ('{"train_resolution": [5]}', "a train_resolution that is no pair"),
        ('{"train_resolution": [5, 900]}', "a train_resolution below 8 px"),
        ('{"image_size": ["5", 6]}', "an image_size that is no pair"),
        ('{"image_size": [-5, 6]}', "an image_size that is no pair"),
    ],
)
def test_one_bad_entry_costs_that_entry(tmp_path: Path, fields: str, problem: str) -> None:
    before, bad, after = _read(tmp_path, f'{{"a": {{"tags": "x"}}, "b": {fields}, "c": {{"tags": "y"}}}}')
    assert problem.replace("an ", "a ") in bad.problem and bad.key == "b"
    assert (before.problem, after.problem, after.caption) == ("", "", '{"caption":"","tags":"y"}')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": {"tags": "x"}, "b": {"ta', "is not valid JSON"),
        ('{"a": {"tags": "x"} "b": {}}', "is not valid JSON"),
        ("", "is not valid JSON"),
        (b'{"a": {"tags": "\xff\xfe"}}', "is not valid JSON"),
    ],
    ids=["cut off", "missing comma", "empty", "not UTF-8"],
)
def test_a_file_that_cannot_be_read_on(tmp_path: Path, text: str | bytes, said: str) -> None:
    with pytest.raises(UserError, match=said):
        _read(tmp_path, text)


def test_a_byte_order_mark_and_lists(tmp_path: Path) -> None:
    text = '{"a": {"tags": ["x", "y"], "caption": ["one", "two"]}}'
    (found,) = _read(tmp_path, b"\xef\xbb\xbf" + text.encode())
    assert json.loads(found.caption) == {"caption": "one\ntwo", "tags": "x, y"}


@pytest.mark.e2e
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "meta.json"
    with path.open("w") as file:
        file.write("{")
        for i in range(100_000):
            file.write(f'{"," if i else ""}\n  "danbooru/{i}": {json.dumps(entry(i, caption="x" * 500), indent=2)}')
        file.write("\n}\n")
    code = "import resource, sys; from pathlib import Path; from trainer.data.sources.metadata import read_metadata\n"
    code += (
        "next(read_metadata(Path(sys.argv[1]))); peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    )
    code += "before = peak(); assert sum(1 for _ in read_metadata(Path(sys.argv[1]))) == 100_000\n"
    code += "sys.exit(peak() - before > 8 * 1024)"
    assert path.stat().st_size > 60e6
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0


def test_what_is_no_object_of_entries_is_told(tmp_path: Path) -> None:
    for text, said in {
        '[{"image_path": "a"}]': "must be one JSON object of entries; it begins with '['",
        '{"image_path": "a"}\n{"image_path": "b"}\n': "if each line is an object, name it .jsonl",
    }.items():
        with pytest.raises(UserError) as caught:
            _read(tmp_path, text)
        assert said in str(caught.value) and len(caught.value.lines) == 1


def test_a_key_that_is_half_a_character_is_told(tmp_path: Path) -> None:
    good, bad = _read(tmp_path, '{"image_path": "a"}\n{"image_path": "b\\ud800"}\n', "meta.jsonl")
    assert (good.key, good.problem) == ("a", "")
    assert (bad.key, bad.problem) == ("b\\ud800", "its key is no Unicode text")

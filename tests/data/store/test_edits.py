"""A shard with an edit reads as if it had been written so; what is not as it was written is told."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.data.records import caption_text
from tests.data.small_set import write_small_set
from trainer.data.buckets import Bucket
from trainer.data.captions import caption_record
from trainer.data.catalog.settings import replace_file
from trainer.data.store.edits import ChangedText, edits_file, pack_edit
from trainer.data.store.snapshot import PreparedSet
from trainer.data.store.snapshot_file import Part, ShardEntry, read_snapshot, snapshot_to_json
from trainer.errors import UserError

BUCKET = Bucket(64, 64)


def edited(root: Path, edits: dict[int, tuple[list[int], list[int], list[ChangedText]]]) -> Path:
    """A set of 15 images in three shards, with edits of some of these: rows, repeats, texts."""
    write_small_set(root, {BUCKET: 15}, repeats=2)
    snapshot = read_snapshot(root, "000001.json")
    edits_file(root, 2).parent.mkdir()
    entries: list[ShardEntry] = []
    with edits_file(root, 2).open("wb") as file:
        for number, entry in enumerate(snapshot.shards):
            edited = entry
            if number in edits:
                edit, content = pack_edit(*edits[number])
                edited = replace(entry, edit=replace(edit, file=2, offset=file.tell()))
                file.write(content)
            entries.append(replace(edited, parts=(Part("photos", edited.rows, edited.virtual_rows),)))
    text = snapshot_to_json(replace(snapshot, number=2, shards=tuple(entries)))
    replace_file(root / "snapshots" / "000002.json", text)
    replace_file(root / "CURRENT", "000002.json\n")
    return root


def text_of(row: int, key: str, caption: str) -> ChangedText:
    return ChangedText(row, key, caption_record(caption).decode())


def test_rows_that_are_gone_counted_anew_renamed_and_captioned(tmp_path: Path) -> None:
    edits = {
        1: ([4, 0, 2], [1, 1, 1], [text_of(2, "z/2", "another"), text_of(4, "a/4 é", "photo 9")]),
        2: ([0, 1, 2, 3, 4], [1, 3, 1, 1, 2], []),
    }
    prepared = PreparedSet.open(edited(tmp_path, edits))
    assert prepared.images("train") == 13 and prepared.rows_per_bucket("train") == [10 + 3 + 8]
    rows = prepared.read("train", 0, np.arange(21))
    assert rows.ok.all() and rows.latents is not None
    values = [int(row[0, 0, 0]) for row in rows.latents]
    assert values == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 9, 5, 7, 10, 11, 11, 11, 12, 13, 14, 14]
    assert rows.repeat.tolist() == [0, 1] * 5 + [0, 0, 0] + [0, 0, 1, 2, 0, 0, 0, 1]
    assert rows.keys[10:13] == ["a/4 é", "64x64/5", "z/2"] and rows.keys[13] == "64x64/10"
    assert [caption_text(text) for text in rows.captions[10:14]] == ["photo 9", "photo 5", "another", "photo 10"]
    middle = prepared.shards("train")[1]
    assert (middle.rows, middle.virtual_rows) == (3, 3)
    captions, repeats = prepared.read_captions(middle)
    assert [caption_text(text.decode()) for text in captions] == ["photo 9", "photo 5", "another"]
    assert repeats == [1, 1, 1]
    assert prepared.read_shard(middle, range(3)).keys == ["a/4 é", "64x64/5", "z/2"]
    last = prepared.read_shard(prepared.shards("train")[2], range(5))
    assert [int(row[0, 0, 0]) for row in last.latents] == [10, 11, 12, 13, 14]  # type: ignore[union-attr]


def test_a_shard_of_which_nothing_is_left_and_one_whose_rows_count_alike_again(tmp_path: Path) -> None:
    prepared = PreparedSet.open(edited(tmp_path, {0: ([], [], []), 2: ([1, 3], [4, 4], [])}))
    assert prepared.rows_per_bucket("train") == [10 + 8] and prepared.images("train") == 7
    rows = prepared.read("train", 0, np.arange(18))
    assert rows.keys == [f"64x64/{i}" for i in (5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 11, 11, 11, 11, 13, 13, 13, 13)]


def test_every_flipped_bit_of_an_edit_costs_only_what_it_covers(tmp_path: Path) -> None:
    texts = [text_of(1, "photos/1", "one"), text_of(3, "photos/3", "three")]
    edited(tmp_path, {1: ([1, 2, 3], [1, 2, 1], texts)})
    whole = edits_file(tmp_path, 2).read_bytes()
    prepared = PreparedSet.open(tmp_path)
    good = prepared.read("train", 0, np.arange(24))
    of_edit = {10, 11, 12, 13}
    rng = random.Random(0)
    index_bytes = 8 * 3 + 12 * 2
    places = [*range(index_bytes), *rng.sample(range(index_bytes, len(whole)), 20)]
    for place in places:
        changed = bytearray(whole)
        changed[place] ^= 1 << rng.randrange(8)
        edits_file(tmp_path, 2).write_bytes(changed)
        rows = PreparedSet.open(tmp_path).read("train", 0, np.arange(24))
        bad = {i for i in range(24) if not rows.ok[i]}
        assert bad and bad <= of_edit and (place >= index_bytes or bad == of_edit)
        assert all(rows.keys[i] == good.keys[i] for i in range(24) if i not in bad)
        assert "changed" in rows.problems[0].reason
    edits_file(tmp_path, 2).unlink()
    assert PreparedSet.open(tmp_path).read("train", 0, np.arange(24)).ok.sum() == 20


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("edit", [2, 0, 9, 9, 1, 0, 0, 0], "has an edit that does not fit it"),
        ("edit", [2, 0, 3, 9, 1, 0, 0, 0], "has an edit that does not fit it"),
        ("edit", [2, 0, 3], "an edit is not eight whole numbers"),
        ("edit", [2, -1, 3, 3, 1, 0, 0, 0], "an edit is not eight whole numbers"),
        ("parts", [[0, 5, 5]], "has parts that are not all of it"),
        ("parts", [[7, 5, 10]], "list index out of range"),
        ("parts", [["a", 5, 10]], "a part is not three whole numbers"),
    ],
)
def test_a_snapshot_that_was_altered(tmp_path: Path, column: str, value: object, said: str) -> None:
    edited(tmp_path, {})
    path = tmp_path / "snapshots" / "000002.json"
    document = json.loads(path.read_text())
    document["shards"][column][0] = value
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match=said):
        PreparedSet.open(tmp_path)

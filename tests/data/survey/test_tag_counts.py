"""Counts of tags and the weights that balance them, against sums over every image in exact fractions."""

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from tests.data.small_set import write_small_set
from trainer.data.buckets import Bucket
from trainer.data.captions import caption_record
from trainer.data.loss_weights import LossWeights, TagSeparators
from trainer.data.store.snapshot import PreparedSet
from trainer.data.store.snapshot_file import read_snapshot, snapshot_name
from trainer.data.survey import tag_counts as module
from trainer.data.survey.tag_counts import TagCounts, balanced, count_tags, tag_counts
from trainer.errors import UserError

TALL, SQUARE = Bucket(128, 64), Bucket(64, 64)
COMMAS = TagSeparators()


def zipf_tags(i: int) -> list[str]:
    """Tags of a distribution as real ones have it, some of them twice; every ninth image has none."""
    draws = np.random.default_rng(i).zipf(1.4, 1 + i % 7)
    return [] if i % 9 == 0 else [f"tag {draw}" for draw in draws.tolist()]


def record(i: int) -> bytes:
    return caption_record(f"photo {i}", ", ".join(zipf_tags(i)))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> PreparedSet:
    root = tmp_path_factory.mktemp("prepared")
    return PreparedSet.open(write_small_set(root, {TALL: 70, SQUARE: 120}, repeats=3, record=record))


IMAGES = [i for count in (70, 120) for i in range(count)]


def test_every_tag_is_counted_as_often_as_it_is_seen(prepared: PreparedSet) -> None:
    counts = count_tags(prepared, COMMAS, 1)
    expected: Counter[str] = Counter()
    shares: dict[str, Fraction] = {}
    for i in IMAGES:
        names = set(zipf_tags(i))
        for name in names:
            expected[name] += 3
            shares[name] = shares.get(name, Fraction(0)) + Fraction(3, len(names))
    assert counts.images == expected
    for name, share in counts.shares.items():
        assert share / 2**32 == pytest.approx(float(shares[name]), rel=1e-8)
    assert (counts.tagged, counts.untagged) == (
        3 * sum(bool(zipf_tags(i)) for i in IMAGES),
        3 * sum(not zipf_tags(i) for i in IMAGES),
    )


@pytest.mark.parametrize(("power", "least", "most"), [(0.5, 0.25, 4.0), (1.0, 0.01, 100.0), (0.3, 0.9, 1.1)])
def test_weights_are_those_of_the_formula_and_1_on_average(
    prepared: PreparedSet, power: float, least: float, most: float
) -> None:
    counts = count_tags(prepared, COMMAS, 1)
    occurrences = sorted(count for count in counts.images.values() for _ in range(count))
    typical = occurrences[(len(occurrences) - 1) // 2]  # the median of what is trained, written out
    assert counts.typical_count == typical
    weight_of = {tag: min(max((typical / n) ** power, least), most) for tag, n in counts.images.items()}
    raw = [np.mean([weight_of[tag] for tag in set(zipf_tags(i))]) for i in IMAGES if zipf_tags(i)]
    weights = LossWeights({}, balance=balanced(counts, power, least, most))
    found = [weights.weight(f"a/{i}", record(i).decode()) for i in IMAGES if zipf_tags(i)]
    np.testing.assert_allclose(found, np.array(raw) / np.mean(raw), rtol=1e-8)
    assert np.mean(found) == pytest.approx(1, rel=1e-8)
    assert [weights.weight(f"a/{i}", record(i).decode()) for i in IMAGES if not zipf_tags(i)] == [1.0] * (8 + 14)
    commonest = max(counts.images, key=lambda tag: counts.images[tag])
    of_common, of_rare = (weights.weight("a/b", caption_record("", tag).decode()) for tag in (commonest, "never seen"))
    assert of_common < 1 < of_rare
    assert of_rare / of_common == pytest.approx(most / weight_of[commonest])


def test_a_median_over_different_tags_would_balance_nothing() -> None:
    """Nine in ten tags occur once: their median is 1, and what is trained often would all weigh the least."""
    images = {f"rare {i}": 1 for i in range(900)} | {f"usual {i}": 100 + i for i in range(100)}
    counts = TagCounts(1000, 0, images, images)
    assert np.median([*images.values()]) == 1
    assert 130 < counts.typical_count < 170
    weights = balanced(counts, 0.5, 0.25, 4.0)
    assert len(weights.common) == 100 and len(set(weights.common.values())) > 90


@pytest.mark.e2e
def test_processes_count_the_same(prepared: PreparedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ROWS_WORTH_A_PROCESS", 10)
    monkeypatch.setattr(module, "_SHARDS_AT_ONCE", 3)
    told: list[int] = []
    alone, both = count_tags(prepared, COMMAS, 1), count_tags(prepared, COMMAS, 2, told.append)
    assert both == alone
    assert sum(told) == prepared.images("train") == 190 and len(told) == 13


def test_counts_are_kept_beside_their_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_small_set(tmp_path, {SQUARE: 12}, record=record)
    prepared = PreparedSet.open(root)
    counts = tag_counts(prepared, COMMAS, 1)
    (kept,) = (root / "tag-counts").iterdir()
    looked: list[object] = []
    count = module.count_tags
    monkeypatch.setattr(module, "count_tags", lambda *arguments: looked.append(0) or count(*arguments))
    assert tag_counts(prepared, COMMAS, 1) == counts and not looked
    assert tag_counts(prepared, TagSeparators(";"), 1) != counts and len(looked) == 1  # other tags, another file
    for damage in (b"", kept.read_bytes()[:-20], b"[]", b'{"format":"sdxl-train tag counts 1"}'):
        kept.write_bytes(damage)
        assert tag_counts(prepared, COMMAS, 1) == counts
    assert len(looked) == 5
    # New images are a new snapshot; and one of the same name in a folder that was made anew is not the old one.
    write_small_set(root, {TALL: 5}, keep=read_snapshot(root, snapshot_name(1)), record=record)
    assert tag_counts(PreparedSet.open(root), COMMAS, 1).tagged == counts.tagged + 4
    (root / "snapshots" / snapshot_name(1)).write_bytes((root / "snapshots" / snapshot_name(2)).read_bytes())
    assert tag_counts(PreparedSet.open(root, snapshot_name(1)), COMMAS, 1).tagged == counts.tagged + 4


def test_what_cannot_be_read_counts_nothing(tmp_path: Path) -> None:
    root = write_small_set(tmp_path, {SQUARE: 12}, record=lambda i: caption_record("", f"tag, {i}"))
    prepared = PreparedSet.open(root)
    (root / "64x64-5.safetensors").unlink()
    shard = root / "64x64-0.safetensors"
    data = bytearray(shard.read_bytes())
    data[data.rindex(b'{"caption":"","tags":"tag, 3"}')] ^= 1
    shard.write_bytes(data)
    counts = count_tags(prepared, COMMAS, 1)
    assert counts.tagged == 12 - 5 - 1 and counts.images["tag"] == 6 and "3" not in counts.images


def test_a_text_of_its_own_for_each_image_is_no_tag(prepared: PreparedSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_TAGS", 20)
    with pytest.raises(UserError, match=r"^data\.prepared \(.*\): holds more than 20 different tags"):
        count_tags(prepared, COMMAS, 1)


def test_a_folder_that_is_read_only_is_counted_anew(prepared: PreparedSet, tmp_path: Path) -> None:
    root = write_small_set(tmp_path, {SQUARE: 5}, record=record)
    (root / "tag-counts").write_text("no folder")
    assert tag_counts(PreparedSet.open(root), COMMAS, 1).tagged == 4
    assert json.loads(record(1))["tags"]

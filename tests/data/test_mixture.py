"""Weighted sources: counts as stated to one image, each image as often as stated, whatever the workers and restarts."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.small_set import byte_tokens, write_small_set
from trainer.data.buckets import Bucket
from trainer.data.catalog.settings import replace_file
from trainer.data.loader import BatchReader, open_loader
from trainer.data.mixture import Mixture
from trainer.data.sampler import Position, next_epoch, with_global_batch
from trainer.data.store.snapshot import PreparedSet
from trainer.data.store.snapshot_file import Part, read_snapshot, snapshot_to_json

SEED = 11
TALL, SQUARE, TINY = Bucket(128, 64), Bucket(64, 64), Bucket(64, 128)
NAMES = ("art", "photos", "rest")


def mixed_set(root: Path, rules: dict[str, dict[str, Any]], rows: dict[Bucket, int], repeats: int = 1) -> PreparedSet:
    """The rows of each shard of five are of three sources: two of art, two photographs, one of the rest."""
    write_small_set(root, rows, repeats)
    snapshot = read_snapshot(root, "000001.json")
    entries = []
    for entry in snapshot.shards:
        counts = [min(2, entry.rows), min(2, max(0, entry.rows - 2)), max(0, entry.rows - 4)]
        parts = tuple(Part(name, n, n * repeats) for name, n in zip(NAMES, counts, strict=True) if n)
        entries.append(replace(entry, parts=parts))
    sources = [{"name": name, **rules.get(name, {})} for name in NAMES]
    changed = replace(snapshot, shards=tuple(entries), settings=snapshot.settings | {"data.sources": sources})
    replace_file(root / "snapshots" / "000001.json", snapshot_to_json(changed))
    return PreparedSet.open(root)


def source_of(key: str) -> str:
    """Image i of a bucket is the (i mod 5)-th of its shard."""
    return NAMES[int(key.partition("/")[2]) % 5 // 2]


def epoch_of(prepared: PreparedSet, mixture: Mixture, epoch: int) -> list[tuple[str, int]]:
    """Key and repeat of all its rows."""
    found = []
    for bucket, count in enumerate(mixture.rows(epoch)):
        ids, further = mixture.stored(epoch, bucket, np.arange(count))
        rows = prepared.read("train", bucket, ids)
        assert rows.ok.all()
        found += zip(rows.keys, (rows.repeat + further).tolist(), strict=True)
    return found


ROWS = {TALL: 100, SQUARE: 235, TINY: 5}  # 340: 136 of art, 136 photographs, 68 of the rest


@pytest.mark.parametrize(
    ("rules", "stated"),
    [
        ({"art": {"weight": 0.5}}, {"art": 68, "photos": 136, "rest": 68}),
        ({"art": {"weight": 0.3}, "rest": {"weight": 2.5}}, {"art": 40.8, "photos": 136, "rest": 170}),
        ({"art": {"per_epoch": 10}, "rest": {"per_epoch": 200}}, {"art": 10, "photos": 136, "rest": 200}),
        ({"art": {"share": 0.2}}, {"art": 51, "photos": 136, "rest": 68}),
        (
            {"art": {"share": 0.1}, "photos": {"share": 0.7}, "rest": {"share": 0.2}},
            {"art": 34, "photos": 238, "rest": 68},
        ),
        ({"art": {"share": 0.25}, "photos": {"weight": 0.5}}, {"art": 136 / 3, "photos": 68, "rest": 68}),
    ],
)
def test_an_epochs_counts_are_those_stated(tmp_path: Path, rules: dict[str, Any], stated: dict[str, float]) -> None:
    prepared = mixed_set(tmp_path, rules, ROWS)
    mixture, total = Mixture.of(prepared, SEED), Counter[str]()
    for epoch in range(4):
        rows = epoch_of(prepared, mixture, epoch)
        assert len(set(rows)) == len(rows), "a row of an epoch has the seeds of no other"
        counts = Counter(source_of(key) for key, _ in rows)
        assert counts == mixture.rows_of_sources(epoch)
        assert all(abs(counts[name] - stated[name]) <= 1 for name in NAMES)
        total += counts
    weights = {name for name in NAMES if "share" not in rules.get(name, {})}
    assert all(abs(total[name] - 4 * stated[name]) < 1 for name in weights), (
        "what is rounded off comes in another epoch"
    )


def test_each_image_is_seen_as_often_as_stated(tmp_path: Path) -> None:
    rules = {"art": {"weight": 0.25}, "photos": {"weight": 1.5}, "rest": {"per_epoch": 7}}
    prepared = mixed_set(tmp_path, rules, ROWS)
    mixture = Mixture.of(prepared, SEED)
    seen: Counter[str] = Counter()
    for epoch in range(20):
        rows = epoch_of(prepared, mixture, epoch)
        seen.update(key for key, _ in rows)
    by_place: dict[tuple[str, str], list[int]] = {}
    for bucket, count in zip((TALL, SQUARE, TINY), (100, 235, 5), strict=True):
        for i in range(count):
            key = f"{bucket.height_px}x{bucket.width_px}/{i}"
            by_place.setdefault((key.partition("/")[0], source_of(key)), []).append(seen[key])
    assert all(max(times) - min(times) <= 1 for times in by_place.values())
    mean = {name: np.mean([t for (_, n), times in by_place.items() if n == name for t in times]) for name in NAMES}
    assert mean["art"] == pytest.approx(5, abs=0.1) and mean["photos"] == pytest.approx(30, abs=0.1)
    assert mean["rest"] == pytest.approx(20 * 7 / 68, abs=0.02)
    assert all(seen[f"64x128/{i}"] for i in range(5)), "the images of a tiny bucket have their turn"


def test_a_tiny_weight_and_repeats_of_images(tmp_path: Path) -> None:
    prepared = mixed_set(tmp_path, {"art": {"weight": 0.01}}, {TALL: 10, SQUARE: 5}, repeats=3)
    mixture = Mixture.of(prepared, SEED)
    counts = [mixture.rows_of_sources(epoch)["art"] for epoch in range(100)]
    assert sum(counts) == 18 and max(counts) == 1  # of 6 images, three times each
    seen = Counter(
        row for epoch in range(100) for row in epoch_of(prepared, mixture, epoch) if source_of(row[0]) == "art"
    )
    assert len(seen) >= 12 and {row[1] for row in seen} == {0, 1, 2}


def test_without_rules_nothing_changes(tmp_path: Path) -> None:
    prepared = mixed_set(tmp_path, {}, ROWS)
    mixture, ids = Mixture.of(prepared, SEED), np.array([4, -1, 0, 99])
    assert mixture.rows(3) == (5, 235, 100) or sorted(mixture.rows(3)) == [5, 100, 235]
    stored, further = mixture.stored(3, 0, ids)
    assert stored is ids and not further.any() and not mixture.rows_of_sources(0)


def trained(prepared: PreparedSet, position: Position, steps: int, workers: int) -> tuple[list[str], Position]:
    """The keys of some steps of so many workers, the share of each read by a loader of its own; and what is next."""
    mixture = Mixture.of(prepared, SEED)
    reader = BatchReader(prepared, "train", SEED, byte_tokens, mixture=mixture)
    batch = -(-position.global_batch // workers)
    keys: list[str] = []
    after = position
    for rank in range(workers):
        options = {"micro_batch": batch, "accumulation": 1, "workers": 0, "prefetch_batches": 2, "pin_memory": False}
        with open_loader(reader, position, rank=rank, world=workers, **options) as loader:  # type: ignore[arg-type]
            for _ in range(steps):
                step = next(loader)
                (found,) = step.batches
                assert found.draw_seeds.shape[0] == batch
                keys += [key for key, weight in zip(found.keys, found.weights.tolist(), strict=True) if weight]
                after = step.position_after
    return keys, after


def test_an_epoch_over_restarts_with_other_workers_is_as_stated(tmp_path: Path) -> None:
    """1, then 3, then 8 workers, the last with another global batch, each going on where the one before ended."""
    prepared = mixed_set(tmp_path, {"art": {"weight": 0.5}, "rest": {"weight": 1.7}}, ROWS)
    mixture = Mixture.of(prepared, SEED)
    position = Position.start(3, 12, epoch=1)
    keys: list[str] = []
    for workers, steps, global_batch in ((1, 7, 12), (3, 5, 12), (8, 4, 16)):
        position = with_global_batch(position, mixture.rows(1), SEED, global_batch)
        some, position = trained(prepared, position, steps, workers)
        keys += some
    while position.epoch == 1:
        some, position = trained(prepared, position, 1, 1)
        keys += some
    assert position == next_epoch(replace(position, epoch=1))
    assert sorted(keys) == sorted(key for key, _ in epoch_of(prepared, mixture, 1))
    assert Counter(map(source_of, keys)) == {"art": 68, "photos": 136, "rest": 116}


def test_threads_that_ask_at_once_are_told_the_same(tmp_path: Path) -> None:
    """Readers ask for an epoch that nobody has asked for before."""
    prepared = mixed_set(tmp_path, {"art": {"weight": 0.3}}, ROWS)

    def told(mixture: Mixture, epoch: int) -> tuple[list[int], list[int]]:
        return list(mixture.rows(epoch)), mixture.stored(epoch, 0, np.arange(5))[0].tolist()

    expected = [told(Mixture.of(prepared, SEED), epoch) for epoch in range(40)]
    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(partial(told, Mixture.of(prepared, SEED)), range(40))) == expected

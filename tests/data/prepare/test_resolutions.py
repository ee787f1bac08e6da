"""One image at several resolutions: encoded once at each, seen as often as stated, whatever changes of the set."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.photographs import pooled, settings_for, write_crops
from tests.data.prepare.test_changes import edit_all, held, name, prepare, remove
from tests.data.prepare.test_prune import prune
from tests.data.records import caption_text
from trainer.config.sections.data.sources import FolderSource
from trainer.data.buckets import Bucket, BucketRules, OtherResolution, at_resolution, bucket_at, make_buckets
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.loader import BatchReader, open_loader
from trainer.data.mixture import Mixture
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import is_current, plan_prepare
from trainer.data.prepare.verification import verify
from trainer.data.sampler import Position
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError

SEED = 5
RULES = BucketRules(resolution=256, min_px=128, max_px=512, step_px=32)
HALF, MIDDLE = OtherResolution(128, 0.25), OtherResolution(192, 0.3)
BESIDE = OtherResolution(128, None)

Seen = tuple[str, str, int]
"""Key, text and seed of a visit."""


def settings_at(prepared: Path, photos: Path, *others: OtherResolution, **changes: Any) -> PrepareSettings:
    return settings_for(prepared, photos, buckets=RULES, also_at=others, **changes)


def epoch_of(prepared: PreparedSet, epoch: int) -> dict[Bucket, list[Seen]]:
    """All visits of an epoch, by the bucket in which they are."""
    mixture, found = Mixture.of(prepared, SEED), {}
    for bucket, count in enumerate(mixture.rows(epoch)):
        ids, further = mixture.stored(epoch, bucket, np.arange(count))
        rows = prepared.read("train", bucket, ids)
        assert rows.ok.all() and (rows.sizes[:, 4:] == _sides(prepared.buckets("train")[bucket])).all()
        texts = [caption_text(record) for record in rows.captions]
        times = (rows.repeat + further).tolist()
        found[prepared.buckets("train")[bucket]] = list(zip(rows.keys, texts, times, strict=True))
    return found


def _sides(bucket: Bucket) -> tuple[int, int]:
    return bucket.height_px, bucket.width_px


def resolution_of(bucket: Bucket) -> int:
    """Which of these resolutions a bucket is of: it is the least that is no smaller."""
    return min(r for r in (128, 192, 256) if r * r >= bucket.height_px * bucket.width_px)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    write_crops(tmp_path / "photos", 60)
    return tmp_path / "photos"


def test_each_image_is_encoded_once_at_each_resolution(photos: Path, tmp_path: Path) -> None:
    settings = settings_at(tmp_path / "prepared", photos, HALF, MIDDLE, validation_fraction=0.1)
    counts, committed, encoded = prepare(settings)
    prepared = PreparedSet.open(settings.prepared)
    train, validation = prepared.images("train"), prepared.images("validation")
    assert (train + validation, committed.images, counts.new_rows) == (60, 60, 60) and validation
    assert len(encoded) == 3 * 60
    further = [s for s in prepared.shards("validation", at_all_resolutions=True) if s.resolution]
    assert Counter(s.resolution for s in further for _ in range(s.rows)) == {128: validation, 192: validation}
    assert sum(prepared.rows_per_bucket("validation")) == validation
    assert sum(prepared.rows_per_bucket("train")) == train
    assert not verify(prepared, 1, lambda *_: None).damages
    # Against a set of that resolution alone, in which an image may have a bucket of another aspect.
    alone = replace(settings, prepared=tmp_path / "alone", buckets=at_resolution(RULES, 128), also_at=())
    prepare(alone)
    latents = {key: held_latents for key, (_, _, held_latents) in held(alone.prepared).items()}
    shards = prepared.shards("train", at_all_resolutions=True)
    of_half = [shard for shard in shards if shard.resolution == 128]
    assert sum(shard.rows for shard in of_half) == train
    same = 0
    for shard in of_half:
        rows = prepared.read_shard(shard, range(shard.rows))
        assert rows.ok.all() and rows.latents is not None
        same += sum(rows.latents[i, :3].tobytes() == latents[key] for i, key in enumerate(rows.keys))
    assert same >= 0.7 * train
    assert is_current(settings) and not prepare(settings)[2]


def test_an_epoch_sees_each_image_once_at_the_stated_shares(photos: Path, tmp_path: Path) -> None:
    sources = (FolderSource(path=photos, repeats=2),)
    settings = settings_at(tmp_path / "prepared", photos, HALF, MIDDLE, sources=sources)
    prepare(settings)
    prepared = PreparedSet.open(settings.prepared)
    seen: Counter[tuple[str, int]] = Counter()
    for epoch in range(40):
        found = epoch_of(prepared, epoch)
        visits = [visit for of_bucket in found.values() for visit in of_bucket]
        assert len(visits) == 120 == len({(key, times) for key, _, times in visits})
        assert Counter(key for key, _, _ in visits) == dict.fromkeys((key for key, _, _ in visits), 2)
        at = Counter(resolution_of(bucket) for bucket, of_bucket in found.items() for _ in of_bucket)
        assert pytest.approx(at, abs=2) == {128: 30, 192: 36, 256: 54}
        stated = Mixture.of(prepared, SEED).rows_of_resolutions(epoch)
        assert stated == {0: at[256], 128: at[128], 192: at[192]}
        seen.update((key, resolution_of(bucket)) for bucket, of_bucket in found.items() for key, _, _ in of_bucket)
    keys = {key for key, _ in seen}
    assert len(keys) == 60
    for resolution, share in ((128, 0.25), (192, 0.3), (256, 0.45)):
        times = [seen[key, resolution] / 80 for key in keys]
        assert np.mean(times) == pytest.approx(share, abs=0.01), "all of them together"
        assert max(abs(t - share) for t in times) < 0.07, "and each image: what is drawn at random parts by 0.15"


def test_an_image_may_be_seen_at_a_resolution_beside_the_main_one(photos: Path, tmp_path: Path) -> None:
    settings = settings_at(tmp_path / "prepared", photos, BESIDE, MIDDLE)
    prepare(settings)
    prepared = PreparedSet.open(settings.prepared)
    for epoch in range(3):
        found = epoch_of(prepared, epoch)
        visits = [visit for of_bucket in found.values() for visit in of_bucket]
        at = Counter(resolution_of(bucket) for bucket, of_bucket in found.items() for _ in of_bucket)
        assert len(visits) == 120 and at[128] == 60 and at[192] == pytest.approx(18, abs=1)
        assert len(set(visits)) == 120, "both visits of an image have seeds of their own"


def test_changes_reach_all_resolutions(photos: Path, tmp_path: Path) -> None:
    settings = settings_at(tmp_path / "prepared", photos, HALF, MIDDLE)
    _, first, _ = prepare(settings)
    before = epoch_of(PreparedSet.open(settings.prepared), 0)
    edit_all(photos)
    _, second, encoded = prepare(settings, removed="drop")
    assert len(encoded) == 3 * 15
    now = held(settings.prepared)
    assert now == lying_at(photos, tmp_path / "anew")
    visits = [visit for of_bucket in epoch_of(PreparedSet.open(settings.prepared), 0).values() for visit in of_bucket]
    assert {key: text for key, text, _ in visits} == {key: text for key, (text, _, _) in now.items()}
    assert len(visits) == second.images == 65
    assert epoch_of(PreparedSet.open(settings.prepared, first.snapshot), 0) == before
    # Most of them go, and their disk space with them.
    for i in range(25, 58):
        remove(photos, name(i))
    prepare(settings, removed="drop")
    before = {bucket: sorted(visits) for bucket, visits in epoch_of(PreparedSet.open(settings.prepared), 3).items()}
    assert prune(settings.prepared).files
    after = PreparedSet.open(settings.prepared)
    assert len({key for visits in epoch_of(after, 3).values() for key, _, _ in visits}) == 32 == after.images("train")
    assert not verify(after, 1, lambda *_: None).damages and is_current(settings)
    rows = Counter(s.resolution for s in after.shards("train", at_all_resolutions=True) for _ in range(s.rows))
    assert rows == {0: 32, 128: 32, 192: 32}


def lying_at(folder: Path, scratch: Path) -> dict[str, tuple[str, int, bytes]]:
    prepare(settings_at(scratch, folder, sources=(FolderSource(path=folder, name="photos"),)))
    return held(scratch)


def test_resolutions_come_and_go_without_encoding_anything_twice(photos: Path, tmp_path: Path) -> None:
    plain = settings_at(tmp_path / "prepared", photos)
    prepare(plain)
    shards = {path: path.read_bytes() for path in plain.prepared.glob("shards/*/*")}
    with_half = replace(plain, also_at=(HALF,))
    assert not is_current(with_half)
    _, committed, encoded = prepare(with_half)
    assert len(encoded) == 60 and committed.images == 60
    assert all(path.read_bytes() == content for path, content in shards.items())
    assert Mixture.of(PreparedSet.open(plain.prepared), SEED).rows_of_resolutions(0) == {0: 45, 128: 15}
    # Another share is another snapshot, and no more.
    _, _, encoded = prepare(replace(plain, also_at=(OtherResolution(128, 0.5),)))
    assert not encoded
    assert Mixture.of(PreparedSet.open(plain.prepared), SEED).rows_of_resolutions(0) == {0: 30, 128: 30}
    # Without it, and meanwhile something changes.
    prepare(plain)
    assert not PreparedSet.open(plain.prepared).has_other_resolutions
    edit_all(photos)
    _, _, encoded = prepare(plain, removed="drop")
    assert len(encoded) == 15
    # It is back.
    _, _, encoded = prepare(with_half)
    assert len(encoded) == 15
    opened = PreparedSet.open(plain.prepared)
    visits = [visit for of_bucket in epoch_of(opened, 0).values() for visit in of_bucket]
    assert {key: text for key, text, _ in visits} == {key: text for key, (text, _, _) in held(plain.prepared).items()}
    # What a set of one resolution does not need, pruning deletes, and it can be made again.
    prepare(plain)
    assert prune(plain.prepared).files
    _, _, encoded = prepare(with_half)
    assert len(encoded) == 65 and is_current(with_half)


def test_an_image_that_cannot_be_encoded_at_one_resolution_is_left_out_of_all(photos: Path, tmp_path: Path) -> None:
    settings = settings_at(tmp_path / "prepared", photos, HALF)
    plan_prepare(settings, show_progress=False)
    spoilt: list[int] = []

    def encode(pixels: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        latents = pooled(pixels, seeds)
        if pixels.shape[2] * pixels.shape[3] <= 128 * 128:
            if not spoilt:
                spoilt.append(int(seeds[0]))
            latents[np.isin(seeds, spoilt)] = np.inf
        return latents

    encode_shards(settings.prepared, 0, 1, encode, vae_batch_size=2)
    committed = commit(settings.prepared)
    assert (committed.images, committed.left_out) == (59, 1)
    opened = PreparedSet.open(settings.prepared)
    visits = [visit for of_bucket in epoch_of(opened, 0).values() for visit in of_bucket]
    assert len(visits) == len({key for key, _, _ in visits}) == 59
    assert is_current(settings) and not prepare(settings)[2]


def test_images_that_are_no_larger_are_held_once(photos: Path, tmp_path: Path) -> None:
    rules = replace(RULES, no_upscale=True)
    settings = settings_at(tmp_path / "prepared", photos, HALF)
    settings = replace(settings, buckets=rules)
    _, committed, encoded = prepare(settings)
    small = sum(bucket_at(bucket, at_resolution(rules, 128)) == bucket for bucket in _image_buckets(settings.prepared))
    assert 5 < small < 55 and len(encoded) == 120 - small
    visits = [v for of_bucket in epoch_of(PreparedSet.open(settings.prepared), 0).values() for v in of_bucket]
    assert len(visits) == committed.images == 60 == len({key for key, _, _ in visits})


def _tokens(captions: Sequence[str]) -> np.ndarray:
    return np.zeros((len(captions), 2, 77), dtype=np.int64)


def _image_buckets(prepared: Path) -> list[Bucket]:
    opened = PreparedSet.open(prepared)
    pairs = zip(opened.buckets("train"), opened.rows_per_bucket("train"), strict=True)
    return [bucket for bucket, rows in pairs for _ in range(rows)]


def test_workers_and_restarts_see_the_same_epoch(photos: Path, tmp_path: Path) -> None:
    settings = settings_at(tmp_path / "prepared", photos, HALF, MIDDLE)
    prepare(settings)
    prepared = PreparedSet.open(settings.prepared)
    mixture = Mixture.of(prepared, SEED)
    expected = sorted(key for visits in epoch_of(prepared, 0).values() for key, _, _ in visits)
    steps = sum(-(-rows // 24) for rows in mixture.rows(0))
    for world in (1, 3, 8):
        keys: list[str] = []
        for rank in range(world):
            position = Position.start(len(mixture.rows(0)), 24)
            for some in (2, steps - 2):  # a restart after two steps
                reader = BatchReader(prepared, "train", SEED, _tokens, mixture=mixture)
                options = {"micro_batch": 24 // world, "accumulation": 1, "workers": 0, "prefetch_batches": 2}
                with open_loader(reader, position, rank=rank, world=world, pin_memory=False, **options) as loader:  # type: ignore[arg-type]
                    for _ in range(some):
                        batches = next(loader)
                        for batch in batches.batches:
                            keys += [
                                key for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True) if weight
                            ]
                        position = batches.position_after
        assert sorted(keys) == expected


def test_images_decoded_anew_at_each_visit(photos: Path, tmp_path: Path) -> None:
    settings = settings_at(tmp_path / "prepared", photos, HALF, mode="images")
    plan_prepare(settings, show_progress=False)
    encode_shards(settings.prepared, 0, 1, None)
    commit(settings.prepared)
    found = epoch_of(PreparedSet.open(settings.prepared), 0)
    at = Counter(resolution_of(bucket) for bucket, of_bucket in found.items() for _ in of_bucket)
    assert at == {128: 15, 256: 45}


def test_a_snapshot_that_was_altered_is_refused(photos: Path, tmp_path: Path) -> None:
    settings = settings_at(tmp_path / "prepared", photos, HALF)
    _, committed, _ = prepare(settings)
    path = settings.prepared / "snapshots" / committed.snapshot
    text = path.read_text()
    places = text[text.index('"rows_of":[') :]
    for damaged in (places.replace("0", "1", 1), places.replace("-1", "99999", 1), places.replace("-1,", "", 1)):
        path.write_text(text.replace(places, damaged))
        if damaged != places.replace("-1", "99999", 1):  # the place of a main shard is not read
            with pytest.raises(UserError, match="was altered or is damaged"):
                PreparedSet.open(settings.prepared)


def test_buckets_of_lower_resolutions_keep_the_aspect() -> None:
    """At SDXL's usual rules; the aspect of a bucket at half the side is that of the main one to the grid."""
    rules = BucketRules()
    for resolution in (512, 768):
        there = at_resolution(rules, resolution)
        assert there.min_px == resolution // 4 and there.max_px == 2 * resolution
        for bucket in make_buckets(rules.resolution, rules.min_px, rules.max_px, rules.step_px):
            smaller = bucket_at(bucket, there)
            assert smaller.height_px * smaller.width_px <= resolution**2
            ratio = (smaller.width_px / smaller.height_px) / (bucket.width_px / bucket.height_px)
            if max(_sides(bucket)) <= 2 * min(_sides(bucket)):
                assert abs(np.log(ratio)) < 0.14, "half the way from 512 x 512 to 576 x 448 is 0.13"
            if bucket.height_px * resolution % (1024 * 64) == bucket.width_px * resolution % (1024 * 64) == 0:
                assert (smaller.height_px, smaller.width_px) == tuple(s * resolution // 1024 for s in _sides(bucket))

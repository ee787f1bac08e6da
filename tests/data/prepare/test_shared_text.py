"""Cached text of images that are held at several resolutions: stored once, read at each; sets of older versions too."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from tests.data.photographs import pooled, write_crops
from tests.data.prepare.test_changes import edit_all, name, remove
from tests.data.prepare.test_resolutions import HALF, MIDDLE, settings_at
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.prepare import encode as encoding
from trainer.data.prepare.commit import Committed, commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.prune import delete_unused, plan_prune
from trainer.data.prepare.stages import plan_prepare
from trainer.data.prepare.verification import verify
from trainer.data.store.snapshot import PreparedSet, ShardSummary
from trainer.data.store.snapshot_file import read_snapshot

POSITIONS, WIDTH, POOLED = 77, 64, 40
TEXT_BYTES = 2 * (POSITIONS * WIDTH + POOLED)


def number_of(caption: str) -> int:
    """Of a caption record, small enough for fp16 to hold it."""
    return xxhash.xxh3_64_intdigest(caption.encode()) % 2048


def encode_text(captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.array([number_of(caption) for caption in captions], dtype=np.float32)
    return np.repeat(numbers, POSITIONS * WIDTH).reshape(-1, POSITIONS, WIDTH), -np.repeat(numbers, POOLED).reshape(
        -1, POOLED
    )


def prepare(settings: PrepareSettings, **options: str) -> Committed:
    plan_prepare(settings, show_progress=False, **options)  # type: ignore[arg-type]
    encode_shards(settings.prepared, 0, 1, pooled, encode_text, vae_batch_size=2)
    return commit(settings.prepared)


def prune(prepared: Path) -> None:
    plan_prune(prepared)
    encode_shards(prepared, 0, 1, None, encode_text)
    commit(prepared)
    delete_unused(prepared)


def require_text_of_all(prepared: Path) -> dict[int, int]:
    """How many images each resolution has; each has the text that its caption gives."""
    opened, images = PreparedSet.open(prepared), dict[int, int]()
    for shard in opened.shards("train", at_all_resolutions=True):
        rows = opened.read_shard(shard, range(shard.rows))
        assert rows.ok.all() and rows.text_hidden is not None and rows.text_pooled is not None, rows.problems
        numbers = np.array([number_of(caption) for caption in rows.captions])
        assert (rows.text_hidden == numbers[:, None, None]).all() and (rows.text_pooled == -numbers[:, None]).all()
        images[shard.resolution] = images.get(shard.resolution, 0) + shard.rows
    assert not verify(opened, 1, lambda *_: None).damages
    return images


def stored(prepared: Path, resolution: int) -> list[ShardSummary]:
    shards = PreparedSet.open(prepared).shards("train", at_all_resolutions=True)
    return [shard for shard in shards if bool(shard.resolution) == bool(resolution)]


def format_of(prepared: Path, snapshot: str) -> str:
    return (prepared / "snapshots" / snapshot).read_text()[:40]


@pytest.fixture
def settings(tmp_path: Path) -> PrepareSettings:
    write_crops(tmp_path / "photos", 60)
    changes = {"text_encoders": "xxh3:4567 fp32", "rows_per_shard": 12}
    return settings_at(tmp_path / "prepared", tmp_path / "photos", HALF, MIDDLE, **changes)


def test_text_is_stored_once_and_read_at_each_resolution(settings: PrepareSettings, tmp_path: Path) -> None:
    done = prepare(settings)
    assert require_text_of_all(settings.prepared) == {0: 60, 128: 60, 192: 60}
    for shard in stored(settings.prepared, 1):
        bucket = PreparedSet.open(settings.prepared).buckets("train")[shard.bucket_index]
        latents = shard.rows * 8 * (bucket.height_px // 8) * (bucket.width_px // 8)
        assert shard.file_bytes < latents + 4096 + 1000 * shard.rows < latents + 4096 + TEXT_BYTES * shard.rows
    assert "snapshot 4" in format_of(settings.prepared, done.snapshot)
    # Without cached text the format is what older versions read.
    plain = replace(settings, prepared=tmp_path / "plain", text_encoders=None)
    plan_prepare(plain, show_progress=False)
    encode_shards(plain.prepared, 0, 1, pooled)
    assert "snapshot 3" in format_of(plain.prepared, commit(plain.prepared).snapshot)


def test_it_follows_what_changes(settings: PrepareSettings, tmp_path: Path) -> None:
    prepare(settings)
    edit_all(tmp_path / "photos")
    prepare(settings, removed="drop")
    assert require_text_of_all(settings.prepared) == {0: 65, 128: 65, 192: 65}
    for i in range(25, 58):
        remove(tmp_path / "photos", name(i))
    prepare(settings, removed="drop")
    assert require_text_of_all(settings.prepared) == {0: 32, 128: 32, 192: 32}
    prune(settings.prepared)
    assert require_text_of_all(settings.prepared) == {0: 32, 128: 32, 192: 32}
    # Another resolution later.
    prepare(replace(settings, also_at=(HALF,)))
    assert require_text_of_all(settings.prepared) == {0: 32, 128: 32}


def test_a_set_of_an_older_version_is_read_and_pruned(
    settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "holds_text", lambda shard: True)
    done = prepare(settings)
    monkeypatch.undo()
    assert "snapshot 3" in format_of(settings.prepared, done.snapshot)
    assert all(shard.info.text_shape for shard in read_snapshot(settings.prepared, done.snapshot).shards)
    assert require_text_of_all(settings.prepared) == {0: 60, 128: 60, 192: 60}
    assert prepare(settings) == done, "nothing is written anew by itself"
    before = sum(shard.file_bytes for shard in stored(settings.prepared, 1))
    main = {shard.name for shard in stored(settings.prepared, 0)}
    prune(settings.prepared)
    assert require_text_of_all(settings.prepared) == {0: 60, 128: 60, 192: 60}
    assert before - sum(shard.file_bytes for shard in stored(settings.prepared, 1)) >= 120 * TEXT_BYTES
    assert {shard.name for shard in stored(settings.prepared, 0)} == main


def test_damaged_text_costs_its_image_at_all_resolutions(settings: PrepareSettings) -> None:
    done = prepare(settings)
    opened = PreparedSet.open(settings.prepared)
    entry = next(s for s in read_snapshot(settings.prepared, done.snapshot).shards if not s.resolution and s.rows > 2)
    begin, row = entry.info.offsets["text_hidden"], 1
    with (settings.prepared / entry.name).open("r+b") as file:
        file.seek(begin + row * 2 * POSITIONS * WIDTH + 100)
        file.write(b"\xff")
    problems = [
        problem
        for shard in opened.shards("train", at_all_resolutions=True)
        for problem in opened.read_shard(shard, range(shard.rows)).problems
    ]
    assert len(problems) == 3 and {(problem.file, problem.row) for problem in problems} == {(entry.name, row)}
    assert {problem.offset for problem in problems} >= {begin + row * 2 * POSITIONS * WIDTH}
    assert len({*problems}) <= 2 and all("text encoders" in problem.reason for problem in problems)

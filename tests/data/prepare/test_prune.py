"""Disk space is given back, and nothing else changes."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.photographs import coffee, pooled, settings_for, write_crops
from tests.data.prepare.prepare_worker import begun, prune
from tests.data.prepare.test_changes import caption, held, lying, name, prepare, remove, rename
from tests.data.records import caption_text
from trainer.config.sections.data.sources import FolderSource
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.prune import Pruned
from trainer.data.prepare.stages import plan_prepare
from trainer.data.prepare.verification import verify
from trainer.data.store.snapshot import PreparedSet


def sizes(prepared: Path) -> dict[str, int]:
    return {path.relative_to(prepared).as_posix(): path.stat().st_size for path in prepared.glob("shards/*/*")}


@pytest.fixture
def sparse(tmp_path: Path) -> PrepareSettings:
    """Sixty images of which 36 are gone, with edits of others."""
    photos = tmp_path / "photos"
    write_crops(photos, 60)
    settings = settings_for(tmp_path / "prepared", photos)
    prepare(settings)
    for i in range(60):
        if i % 5 not in (0, 3):
            remove(photos, name(i))
    caption(photos, name(5), "another text")
    rename(photos, name(10), "renamed")
    prepare(settings, removed="drop")
    return settings


def test_shards_that_are_more_than_half_dead_are_written_anew(sparse: PrepareSettings, tmp_path: Path) -> None:
    prepared = sparse.prepared
    before, old = held(prepared), sizes(prepared)
    assert before == lying(tmp_path / "photos", tmp_path / "anew")
    pruned = prune(prepared)
    assert held(prepared) == before
    assert sum(sizes(prepared).values()) < 0.7 * sum(old.values())
    assert pruned.files > 5 and pruned.num_bytes > 0.3 * sum(old.values())
    assert [path.name for path in (prepared / "snapshots").iterdir()] == ["000003.json"]
    found = verify(PreparedSet.open(prepared), 1, lambda *_: None)
    assert (found.images, found.damages) == (24, 0)
    # What is there is still known, may change, and is pruned again.
    counts, done, encoded = prepare(sparse)
    assert counts.scan.known == done.images == 24 and not encoded and done.snapshot == "000003.json"
    assert prune(prepared) == Pruned(0, 0, 0)
    photos = tmp_path / "photos"
    caption(photos, name(0), "after pruning")
    rename(photos, "renamed", "again")
    for i in range(15, 60):
        if (photos / f"{name(i)}.jpg").exists():
            remove(photos, name(i))
    assert not prepare(sparse, removed="drop")[2]
    prune(prepared)
    assert held(prepared) == lying(photos, tmp_path / "anew")
    # What was pruned is not stored any more.
    write_crops(photos, 60)
    (photos / "again.jpg").unlink()
    counts, done, encoded = prepare(sparse)
    assert len(encoded) + counts.scan.back == 54 and len(encoded) > 45 and done.images == 60
    assert held(prepared) == lying(photos, tmp_path / "anew")


def test_all_of_a_shard_may_be_gone(tmp_path: Path) -> None:
    write_crops(tmp_path / "photos", 20)
    write_crops(tmp_path / "more", 6, seed=3)
    prepare(settings_for(tmp_path / "prepared", tmp_path / "photos", tmp_path / "more"))
    settings = settings_for(tmp_path / "prepared", tmp_path / "more")
    prepare(settings)
    prune(settings.prepared)
    assert (
        held(settings.prepared) == held(settings.prepared) and PreparedSet.open(settings.prepared).images("train") == 6
    )
    counts, done, encoded = prepare(settings_for(tmp_path / "prepared", tmp_path / "more", tmp_path / "photos"))
    # A few lay in shards of both, more than half of which counts.
    assert len(encoded) == counts.scan.new == 20 - counts.scan.back and counts.scan.back < 5 and done.images == 26


def test_masks_and_text_outputs_are_copied(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(10):
        coffee().crop((i, 0, i + 150, 150)).save(tmp_path / "photos" / f"{i}.png")
        Image.new("L", (150, 150), 20 * i).save(tmp_path / "photos" / f"{i}-masklabel.png")
        (tmp_path / "photos" / f"{i}.txt").write_text("x" * i)
    sources = (FolderSource(path=tmp_path / "photos", masks="files"),)
    settings = settings_for(tmp_path / "prepared", sources=sources, text_encoders="xxh3:00 fp32")

    def encode_text(records: list[str]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.array([len(caption_text(record)) for record in records], dtype=np.float32)
        return np.broadcast_to(lengths[:, None, None], (len(records), 3, 2)).copy(), np.stack([lengths] * 4, axis=1)

    plan_prepare(settings, show_progress=False)
    encode_shards(settings.prepared, 0, 1, pooled, encode_text)  # type: ignore[arg-type]
    commit(settings.prepared)

    def everything() -> dict[str, tuple[float, float, int]]:
        opened = PreparedSet.open(settings.prepared)
        assert opened.text_shape == (3, 2, 4)
        rows = opened.read("train", 0, np.arange(opened.rows_per_bucket("train")[0]), with_masks=True)
        assert (
            rows.ok.all() and rows.text_hidden is not None and rows.text_pooled is not None and rows.masks is not None
        )
        return {
            key: (rows.text_hidden[i, 2, 1], rows.text_pooled[i, 3], rows.masks[i, 0, 0])
            for i, key in enumerate(rows.keys)
        }

    for i in (1, 2, 3, 5, 6, 7, 8):
        for ending in (".png", ".txt", "-masklabel.png"):
            (tmp_path / "photos" / f"{i}{ending}").unlink()
    plan_prepare(settings, show_progress=False, removed="drop")
    commit(settings.prepared)
    before = everything()
    assert before == {f"photos/{i}": (i, i, 20 * i) for i in (0, 4, 9)}
    prune(settings.prepared)
    assert everything() == before and len(sizes(settings.prepared)) == 2


@pytest.mark.e2e
def test_killed_while_pruning(sparse: PrepareSettings, tmp_path: Path) -> None:
    before = held(sparse.prepared)
    shutil.copytree(sparse.prepared, tmp_path / "once")
    prune(tmp_path / "once")
    rng = np.random.default_rng()
    for _ in range(12):
        with begun(sparse.prepared, "prune") as worker:
            time.sleep(float(rng.uniform(0.0, 0.15)))
            worker.kill()
        assert held(sparse.prepared) == before
    prune(sparse.prepared)
    assert held(sparse.prepared) == before and sizes(sparse.prepared) == sizes(tmp_path / "once")

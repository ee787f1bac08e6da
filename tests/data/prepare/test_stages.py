"""The whole of prepare: what is found, what is left out, and the same bytes however it was interrupted or split."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.photographs import astronaut, pooled, settings_for, write_crops
from tests.data.prepare.prepare_worker import begun
from tests.data.records import caption_text
from trainer.config.sections.data.sources import FolderSource
from trainer.data.buckets import Bucket, Placement
from trainer.data.catalog.catalog import count_rows, open_catalog
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.images import load_pixels
from trainer.data.prepare.commit import Committed, commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import is_current, plan_prepare, progress
from trainer.data.store.rows import Rows
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError
from trainer.keyed import draw_seed

ROOT = Path(__file__).parents[3]


def _prepare(settings: PrepareSettings) -> Committed:
    plan_prepare(settings, show_progress=False)
    encode_shards(settings.prepared, 0, 1, pooled, vae_batch_size=2)
    return commit(settings.prepared)


def _everything(prepared: Path, split: str) -> list[Rows]:
    opened = PreparedSet.open(prepared)
    return [opened.read(split, i, np.arange(rows)) for i, rows in enumerate(opened.rows_per_bucket(split))]


def _finished_bytes(prepared: Path) -> dict[str, bytes]:
    """All files of a finished set but the working files."""
    working = ("catalog.sqlite", "catalog.sqlite-journal", "lock", "moved.json")
    files = sorted(path for path in prepared.rglob("*") if path.is_file() and path.name not in working)
    return {str(path.relative_to(prepared)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty crops, among them files that cannot be listed and files that cannot be decoded."""
    folder = tmp_path_factory.mktemp("source") / "photos"
    write_crops(folder, 60)
    intact = (folder / "crop-0-000.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(intact[: len(intact) // 2])
    (folder / "crop-0-007.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("no photograph " * 100)
    astronaut().resize((90, 90)).save(folder / "crop-0-001.png")
    (folder / "crop-0-010.txt").unlink()
    return folder


def test_what_is_found_and_what_is_left_out(photos: Path, tmp_path: Path) -> None:
    settings = settings_for(tmp_path, photos, validation_fraction=0.2)
    assert not is_current(settings)
    counts = plan_prepare(settings, show_progress=False)
    assert (counts.scan.listed, counts.scan.new, counts.scan.bad) == (63, 61, 2)
    assert counts.new_rows == counts.pending_rows == sum(counts.rows.values()) == 61
    assert counts.empty_captions == 2  # one file was taken away, and the cut file never had one
    assert progress(tmp_path) == (0, 61) and not is_current(settings)
    encode_shards(tmp_path, 0, 1, pooled, vae_batch_size=2)
    assert progress(tmp_path) == (61, 61)
    done = commit(tmp_path)
    assert (done.snapshot, done.images, done.virtual_rows, done.left_out) == ("000001.json", 60, 60, 3)
    assert commit(tmp_path).snapshot == "000001.json"
    assert progress(tmp_path) == (0, 0) and is_current(settings)
    bad = {
        Path(row["path"]).name: row["reason"]
        for row in map(json.loads, (tmp_path / "bad.jsonl").read_text().splitlines())
    }
    assert sorted(bad) == ["crop-0-007.jpg", "cut.jpg", "text.jpg"]
    assert "truncated" in bad["cut.jpg"]
    batches = _everything(tmp_path, "train") + _everything(tmp_path, "validation")
    keys = [key for rows in batches for key in rows.keys]
    assert len(keys) == len(set(keys)) == 60 and all(rows.ok.all() for rows in batches)
    assert 3 <= sum(len(rows.keys) for rows in _everything(tmp_path, "validation")) <= 22


def test_latents_are_those_of_the_image(photos: Path, tmp_path: Path) -> None:
    settings = replace(settings_for(tmp_path, photos), sources=(FolderSource(path=photos, repeats=3),))
    _prepare(settings)
    with open_catalog(tmp_path) as connection:
        assert sum(count_rows(connection).values()) == 60
        placed = connection.execute(
            "SELECT key, path, original_h, original_w, resized_h, resized_w, crop_top, crop_left FROM rows"
        ).fetchall()
    sizes = {v[0]: v for v in placed}
    for rows in _everything(tmp_path, "train"):
        assert np.array_equal(np.bincount(rows.repeat), np.full(3, len(rows.keys) // 3))
        for i in range(0, len(rows.keys), 7):
            key, path, height, width, resized_h, resized_w, top, left = sizes[rows.keys[i]]
            bucket = Bucket(*rows.sizes[i, 4:].tolist())
            assert rows.sizes[i].tolist() == [height, width, top, left, bucket.height_px, bucket.width_px]
            with Image.open(path) as image:
                assert image.size == (width, height)
            placement = Placement(bucket, (resized_h, resized_w), (top, left))
            pixels = load_pixels(Path(path), (height, width), placement).transpose(2, 0, 1)[None]
            expected = pooled(pixels, np.array([draw_seed("vae", key)])).astype(np.float16)
            assert np.array_equal(rows.latents[i], expected[0])
            stem = Path(path).with_suffix(".txt")
            assert caption_text(rows.captions[i]) == (stem.read_text(encoding="utf-8") if stem.exists() else "")


@pytest.mark.e2e
def test_killed_at_any_moment(photos: Path, tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    _prepare(settings_for(whole, photos, validation_fraction=0.2))
    rng = np.random.default_rng()
    done = 0
    for _ in range(5):
        with begun(torn, photos) as worker:
            time.sleep(float(rng.uniform(0.0, 0.3)))
            worker.kill()
        finished = len(list(torn.glob("shards/*/*.safetensors")))
        assert finished >= done  # finished shards stay
        done = finished
    _prepare(settings_for(torn, photos, validation_fraction=0.2))
    assert _finished_bytes(torn) == _finished_bytes(whole)


@pytest.mark.e2e
def test_two_workers_one_killed(photos: Path, tmp_path: Path) -> None:
    whole, split = tmp_path / "whole", tmp_path / "split"
    _prepare(settings_for(whole, photos))
    plan_prepare(settings_for(split, photos), show_progress=False)
    with begun(split, photos, 0, 2) as first, begun(split, photos, 1, 2) as second:
        time.sleep(0.05)
        first.kill()
        assert second.wait(timeout=600) == 0
    commit(split)
    assert _finished_bytes(split) == _finished_bytes(whole)


def test_new_images_join_as_a_generation(photos: Path, tmp_path: Path) -> None:
    source, prepared = tmp_path / "photos", tmp_path / "prepared"
    write_crops(source, 12, seed=1)
    settings = settings_for(prepared, source)
    assert _prepare(settings).images == 12
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in prepared.glob("shards/000001/*")}
    first = PreparedSet.open(prepared)

    write_crops(source, 7, seed=2)
    (source / "crop-1-003.jpg").unlink()
    (source / "crop-1-004.txt").write_text("another caption")
    counts = plan_prepare(settings, show_progress=False)
    found = counts.scan
    assert (found.new, found.known, found.captions, found.changed, found.removed) == (7, 11, 1, 0, 1)
    assert not is_current(settings)
    encode_shards(prepared, 0, 1, pooled)
    assert commit(prepared).images == 18 and is_current(settings)
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in prepared.glob("shards/000001/*")}
    assert [path.name for path in sorted(prepared.glob("snapshots/*"))] == ["000001.json", "000002.json"]
    assert PreparedSet.open(prepared).images("train") == 18
    assert PreparedSet.open(prepared, first.snapshot_name).images("train") == 12

    # Nothing new: no further snapshot. Another source at the end: the rest stays as it is.
    assert _prepare(settings).snapshot == "000002.json"
    write_crops(tmp_path / "more" / "photos", 3, seed=3)
    wider = settings_for(prepared, source, tmp_path / "more" / "photos")
    assert not is_current(wider)
    assert _prepare(wider) == Committed("000003.json", images=21, virtual_rows=21, left_out=0)
    assert is_current(wider)


def test_a_mended_image_is_taken_up(tmp_path: Path) -> None:
    source, prepared = tmp_path / "photos", tmp_path / "prepared"
    write_crops(source, 4, seed=1)
    intact = (source / "crop-1-000.jpg").read_bytes()
    (source / "crop-1-000.jpg").write_bytes(intact[:1500])
    assert _prepare(settings_for(prepared, source)) == Committed("000001.json", 3, 3, left_out=1)
    assert _prepare(settings_for(prepared, source)).snapshot == "000001.json"  # still bad: not tried again
    (source / "crop-1-000.jpg").write_bytes(intact)
    assert _prepare(settings_for(prepared, source)) == Committed("000002.json", 4, 4, left_out=0)
    assert (prepared / "bad.jsonl").read_text() == ""


def test_latents_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    write_crops(tmp_path / "photos", 9, seed=1)
    settings = settings_for(tmp_path / "prepared", tmp_path / "photos")
    victims = {draw_seed("vae", f"photos/crop-1-00{i}"): value for i, value in ((2, np.nan), (5, np.inf), (7, 7e4))}

    def encode(pixels: np.ndarray, draw_seeds: np.ndarray) -> np.ndarray:
        latents = pooled(pixels, draw_seeds)
        for i, seed in enumerate(draw_seeds.tolist()):
            latents[i, 1, 2, 3] = victims.get(seed, latents[i, 1, 2, 3])
        return latents

    plan_prepare(settings, show_progress=False)
    encode_shards(settings.prepared, 0, 1, encode)
    assert commit(settings.prepared) == Committed("000001.json", 6, 6, left_out=3)
    assert "model.vae_precision" in (settings.prepared / "bad.jsonl").read_text()


def test_cached_text(tmp_path: Path) -> None:
    write_crops(tmp_path / "photos", 7, seed=1)
    settings = settings_for(tmp_path / "prepared", tmp_path / "photos", text_encoders="xxh3:77 fp32")

    def encode_text(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        numbers = np.array([int(caption_text(caption).split()[1].strip(",")) for caption in captions], dtype=np.float32)
        return np.tile(numbers[:, None, None], (1, 77, 8)), np.tile(-numbers[:, None], (1, 4))

    plan_prepare(settings, show_progress=False)
    with pytest.raises(ValueError, match="cache_text"):
        encode_shards(settings.prepared, 0, 1, pooled)
    encode_shards(settings.prepared, 0, 1, pooled, encode_text)
    commit(settings.prepared)
    for rows in _everything(settings.prepared, "train"):
        assert rows.text_hidden is not None and rows.text_pooled is not None and rows.ok.all()
        numbers = np.array([int(key[-3:]) for key in rows.keys])
        assert (rows.text_hidden == numbers[:, None, None]).all() and rows.text_hidden.shape[1:] == (77, 8)
        assert (rows.text_pooled == -numbers[:, None]).all() and rows.text_pooled.shape[1:] == (4,)


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    write_crops(tmp_path / "photos", 4, seed=1)
    settings = settings_for(tmp_path / "prepared", tmp_path / "photos")
    _prepare(settings)
    changed = replace(
        settings,
        buckets=replace(settings.buckets, resolution=256),
        vae="xxh3:ffff fp32",
        sources=(FolderSource(path=tmp_path / "photos", caption_extension=".caption"),),
    )
    for check in (is_current, plan_prepare):
        with pytest.raises(UserError) as caught:
            check(changed)
        text = "\n".join(caught.value.lines)
        assert "data.buckets.resolution = 128, the configuration has 256" in text
        assert "caption_extension" not in text  # what is in a source may change
        assert "xxh3:0123" in text and "xxh3:ffff" in text and "another folder" in text
        assert len(caught.value.lines) == 3


def test_nothing_usable_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    settings = settings_for(tmp_path / "prepared", tmp_path / "photos")
    with pytest.raises(UserError, match="no image"):
        plan_prepare(settings, show_progress=False)
    (tmp_path / "photos" / "a.jpg").write_text("x")
    with pytest.raises(UserError, match=r"none of 1 images can be used, see .*bad\.jsonl"):
        plan_prepare(settings, show_progress=False)
    write_crops(tmp_path / "photos", 2)
    for path in (tmp_path / "photos").glob("crop*.jpg"):
        path.write_bytes(path.read_bytes()[:1000])
    plan_prepare(settings, show_progress=False)
    with pytest.raises(UserError, match="shards are missing; run prepare again"):
        commit(settings.prepared)
    encode_shards(settings.prepared, 0, 1, pooled)
    with pytest.raises(UserError, match="no image could be encoded"):
        commit(settings.prepared)


def test_the_parents_part_needs_no_torch() -> None:
    code = "import sys, trainer.data.prepare.stages, trainer.data.prepare.encode; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0

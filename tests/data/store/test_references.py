"""Latents and images used where they lie: from the sources to rows, damaged files, repacking, interruptions."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.kohya_files import (
    entry,
    kohya_npz,
    latents_of,
    npz_bytes,
    settings_of,
    write_files,
    write_metadata,
    write_tar,
)
from trainer.config.sections.data.sources import FolderSource, KohyaJsonSource, LatentTarsSource
from trainer.data.augment import NOT_AUGMENTED, View, draw_view
from trainer.data.buckets import Placement
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.prepare.commit import Committed, commit
from trainer.data.prepare.encode import encode_shards, pending_payloads
from trainer.data.prepare.stages import is_current, plan_prepare, plan_repack
from trainer.data.store import references
from trainer.data.store.rows import Rows
from trainer.data.store.snapshot import PreparedSet

BUCKETS = [(64, 128), (128, 64)]


def _prepare(settings: PrepareSettings, **other: Any) -> Committed:
    plan_prepare(settings, show_progress=False, **other)
    encode_shards(settings.prepared, 0, 1, encode=None)
    return commit(settings.prepared)


def _repack(settings: PrepareSettings) -> Committed:
    plan_repack(settings.prepared)
    encode_shards(settings.prepared, 0, 1, encode=None)
    return commit(settings.prepared)


def _source(tmp_path: Path, n: int = 20) -> KohyaJsonSource:
    """Latents of two buckets: every fourth has nothing but latents, and no size in the metadata."""
    latents = tmp_path / "latents"
    entries, files = {}, {}
    for i in range(n):
        bucket = BUCKETS[i % 2]
        key = f"set/{i:03d}"
        bare = i % 4 == 3
        entries[key] = {"tags": f"tag{i}"} if bare else entry(i, bucket, image_size=[320, 210])
        files[f"{key}.npz"] = npz_bytes(latents=latents_of(i, bucket)) if bare else kohya_npz(i, bucket)
    write_files(latents, files)
    write_metadata(tmp_path / "meta.json", entries)
    return KohyaJsonSource(type="kohya_json", path=tmp_path / "meta.json", latents=latents)


def _rows(prepared: PreparedSet, split: str = "train") -> dict[str, dict[str, Any]]:
    """Every row by its key; each must be read."""
    found = {}
    for bucket in range(len(prepared.buckets(split))):
        rows = prepared.read(split, bucket, np.arange(prepared.rows_per_bucket(split)[bucket]))
        assert rows.ok.all(), rows.problems
        for i, key in enumerate(rows.keys):
            payload = rows.pixels if rows.latents is None else rows.latents
            found[key] = {"payload": payload[i], "caption": rows.captions[i], "sizes": rows.sizes[i].tolist()}
    return found


def _check_rows(found: dict[str, dict[str, Any]], n: int = 20, name: str = "meta") -> None:
    assert len(found) == n
    for i in range(n):
        row, bucket = found[f"{name}/set/{i:03d}"], BUCKETS[i % 2]
        np.testing.assert_array_equal(row["payload"], latents_of(i, bucket).astype(np.float16))
        bare = i % 4 == 3
        # The file knows better than the metadata; without either, the bucket stands for the image.
        assert row["sizes"] == ([*bucket, 0, 0, *bucket] if bare else [200, 300, 5, 3, *bucket])
        assert json.loads(row["caption"]).get("tags") == (f"tag{i}" if bare else f"tag{i}, solo")


def test_loose_files_are_read_where_they_lie(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "prepared", _source(tmp_path))
    done = _prepare(settings)
    assert (done.images, done.left_out) == (20, 0)
    assert is_current(settings)
    _check_rows(_rows(PreparedSet.open(settings.prepared)))
    shards = list((settings.prepared / "shards").rglob("*.safetensors"))
    assert len(shards) == 2 and all(shard.stat().st_size < 10_000 for shard in shards)
    # A second time finds nothing new.
    again = plan_prepare(settings, show_progress=False)
    assert (again.scan.new, again.scan.known, again.pending_rows) == (0, 20, 0)


def test_members_of_tars_are_read_where_they_lie(tmp_path: Path) -> None:
    _source(tmp_path)
    members = {path.name: path.read_bytes() for path in sorted((tmp_path / "latents/set").iterdir())}
    write_tar(tmp_path / "tars/0.tar", dict(list(members.items())[:12]))
    write_tar(tmp_path / "tars/1.tar", dict(list(members.items())[12:]))
    settings = settings_of(
        tmp_path / "prepared",
        LatentTarsSource(type="latent_tars", metadata=tmp_path / "meta.json", tars=tmp_path / "tars"),
    )
    assert _prepare(settings).images == 20
    prepared = PreparedSet.open(settings.prepared)
    _check_rows(_rows(prepared))
    (tmp_path / "tars/1.tar").write_bytes((tmp_path / "tars/1.tar").read_bytes()[:5000])
    rows = PreparedSet.open(settings.prepared).read("train", 0, np.arange(10))
    assert rows.ok.tolist() == [True] * 6 + [False] * 4
    assert {problem.file for problem in rows.problems} == {str(tmp_path / "tars/1.tar")}
    assert {problem.reason for problem in rows.problems} == {"the file ends before the row does"}
    assert all(problem.offset % 512 == 0 for problem in rows.problems)


def _encode_grey(pixels: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    return pixels[:, :1, ::8, ::8].repeat(4, axis=1)


def test_images_and_latents_in_one_set(tmp_path: Path) -> None:
    source = _source(tmp_path)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (256, 128), (i * 50,) * 3).save(tmp_path / f"photos/{i}.png")
    settings = settings_of(tmp_path / "prepared", FolderSource(path=tmp_path / "photos", repeats=2), source)
    plan_prepare(settings, show_progress=False)
    assert pending_payloads(settings.prepared) == {"encode", "npz"}
    encode_shards(settings.prepared, 0, 1, _encode_grey)
    assert pending_payloads(settings.prepared) == set()
    done = commit(settings.prepared)
    assert (done.images, done.virtual_rows) == (23, 26)
    prepared = PreparedSet.open(settings.prepared)
    assert [(b.height_px, b.width_px) for b in prepared.buckets("train")] == [(64, 128), (128, 64)]
    assert prepared.rows_per_bucket("train") == [16, 10]
    found = _rows(prepared)
    assert len(found) == 23
    _check_rows({key: row for key, row in found.items() if key.startswith("meta/")})


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"", "is empty"),
        (kohya_npz(0)[:-7], "no zip archive, or cut off"),
        (kohya_npz(0, (128, 64)), "latents of shape"),
        (npz_bytes(latents=np.full((4, 8, 16), np.nan, dtype=np.float32)), "not finite"),
        (kohya_npz(0)[:700] + b"\0" + kohya_npz(0)[701:], "checksum mismatch in latents"),
    ],
    ids=["gone", "empty", "cut off", "another shape", "not finite", "a changed byte"],
)
def test_a_file_that_went_bad_costs_its_row(tmp_path: Path, data: bytes | None, reason: str) -> None:
    settings = settings_of(tmp_path / "prepared", _source(tmp_path))
    _prepare(settings)
    path = tmp_path / "latents/set/004.npz"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    prepared = PreparedSet.open(settings.prepared)
    rows: Rows = prepared.read("train", 0, np.arange(10))
    assert rows.ok.tolist() == [i != 2 for i in range(10)]
    (problem,) = rows.problems
    assert (problem.file, problem.row, problem.offset) == (str(path), 2, 0)
    assert reason in problem.reason
    assert rows.latents is not None and not rows.latents[2].any() and rows.keys[2] == ""
    # Repacking leaves it out, with the reason.
    done = _repack(settings)
    assert (done.images, done.left_out) == (19, 1)
    (bad,) = map(json.loads, (settings.prepared / "bad.jsonl").read_text().splitlines())
    assert (bad["path"], bad["key"]) == (str(path), "meta/set/004") and reason in bad["reason"]


def test_what_is_bad_when_it_is_listed(tmp_path: Path) -> None:
    source = _source(tmp_path)
    entries = json.loads((tmp_path / "meta.json").read_text())
    write_metadata(tmp_path / "meta.json", {**entries, "gone": entry(1), "odd": {"tags": 5}, "empty": entry(2)})
    write_files(tmp_path / "latents", {"empty.npz": b"", "set/003.npz": b"no zip, though it is long enough" * 9})
    settings = settings_of(tmp_path / "prepared", source)
    assert _prepare(settings).images == 19
    bad = {
        line["key"]: line["reason"]
        for line in map(json.loads, (settings.prepared / "bad.jsonl").read_text().splitlines())
    }
    assert bad == {
        "meta/gone": "there are no latents of this name",
        "meta/odd": "its metadata has a tags that is no text",
        "meta/empty": "is empty",
        "meta/set/003": "no zip archive, or cut off",
    }
    # Mended ones are picked up as a new generation.
    write_metadata(tmp_path / "meta.json", entries)
    write_files(tmp_path / "latents", {"set/003.npz": npz_bytes(latents=latents_of(3, (128, 64)))})
    done = _prepare(settings)
    assert (done.images, done.left_out, done.snapshot) == (20, 0, "000002.json")
    _check_rows(_rows(PreparedSet.open(settings.prepared)))


def test_repacking_gives_the_same_rows_in_the_same_order(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "prepared", _source(tmp_path), validation_fraction=0.2)
    first = _prepare(settings)
    lying = PreparedSet.open(settings.prepared)
    plan_repack(settings.prepared)
    assert pending_payloads(settings.prepared) == {"repack"}
    assert not is_current(settings)
    encode_shards(settings.prepared, 0, 1, encode=None)
    done = commit(settings.prepared)
    assert (done.images, done.virtual_rows) == (first.images, first.virtual_rows) == (20, 20)
    assert plan_repack(settings.prepared) == (0, 0)
    shutil.move(tmp_path / "latents", tmp_path / "moved")
    prepared = PreparedSet.open(settings.prepared)
    assert [shard.name.split("/")[1] for shard in prepared.shards("train")] == ["000002"] * len(
        prepared.shards("train")
    )
    _check_rows({**_rows(prepared), **_rows(prepared, "validation")})
    for bucket, rows in enumerate(prepared.rows_per_bucket("train")):
        assert prepared.read("train", bucket, np.arange(rows)).keys == [
            record.key for i in range(rows) if (record := lying.read_record("train", bucket, i)) is not None
        ]
    # A run that began before goes on with the files where they lie.
    shutil.move(tmp_path / "moved", tmp_path / "latents")
    old = PreparedSet.open(settings.prepared, first.snapshot)
    _check_rows({**_rows(old), **_rows(old, "validation")})


def test_an_interrupted_repack_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    source = _source(tmp_path)
    whole, broken = settings_of(tmp_path / "whole", source), settings_of(tmp_path / "broken", source)
    for settings in (whole, broken):
        _prepare(settings)
    _repack(whole)
    plan_repack(broken.prepared)
    encode_shards(broken.prepared, 0, 1, encode=None)
    for path in sorted((broken.prepared / "shards/000002").iterdir())[::2]:
        path.rename(path.with_name(path.name + ".tmp"))  # as if killed before they were renamed
    plan_prepare(broken, show_progress=False)
    _repack(broken)
    assert not list(broken.prepared.rglob("*.tmp"))
    for path in sorted(whole.prepared.rglob("*.safetensors")):
        assert path.read_bytes() == (broken.prepared / path.relative_to(whole.prepared)).read_bytes()


def test_a_flipped_bit_in_a_shard_of_references_is_found(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "prepared", _source(tmp_path, 6))
    _prepare(settings)
    path = next(p for p in (settings.prepared / "shards").rglob("*.safetensors") if "64x128" in p.name)
    whole = path.read_bytes()
    for i in range(0, len(whole), 97):
        data = bytearray(whole)
        data[i] ^= 1 << i % 8
        path.write_bytes(data)
        rows = PreparedSet.open(settings.prepared).read("train", 0, np.arange(3))
        for j, seed in enumerate((0, 2, 4)):
            if rows.ok[j]:
                assert rows.keys[j] == f"meta/set/{seed:03d}" and rows.sizes[j].tolist() == [200, 300, 5, 3, 64, 128]
                assert rows.latents is not None
                np.testing.assert_array_equal(rows.latents[j], latents_of(seed).astype(np.float16))


def test_the_first_few_of_each_source(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "prepared", _source(tmp_path))
    assert _prepare(settings, limit=6).images == 6
    assert sorted(_rows(PreparedSet.open(settings.prepared))) == [f"meta/set/{i:03d}" for i in range(6)]
    done = _prepare(settings)
    assert done.images == 20
    _check_rows(_rows(PreparedSet.open(settings.prepared)))


def test_images_where_they_lie(tmp_path: Path) -> None:
    """data.mode: images: nothing is encoded, and each read may see another part of the image."""
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (80, 170, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos/a.png")
    settings = replace(settings_of(tmp_path / "prepared", FolderSource(path=tmp_path / "photos")), mode="images")
    plan_prepare(settings, show_progress=False)
    assert pending_payloads(settings.prepared) == {"image"}
    encode_shards(settings.prepared, 0, 1, encode=None)
    commit(settings.prepared)
    prepared = PreparedSet.open(settings.prepared)
    assert prepared.holds_images
    (row,) = _rows(prepared).values()
    assert row["payload"].shape == (3, 64, 128) and row["sizes"] == [80, 170, 0, 4, 64, 128]

    def mirrored(key: str, repeat: int, centred: Placement) -> View:
        assert (key, repeat, centred.resized_hw) == ("photos/a", 0, (64, 136))
        return replace(draw_view(centred, NOT_AUGMENTED, seed=0), flipped=True)

    rows = prepared.read("train", 0, np.array([0]), choose_view=mirrored)
    assert rows.pixels is not None
    np.testing.assert_array_equal(rows.pixels[0], row["payload"][:, :, ::-1])
    (tmp_path / "photos/a.png").write_bytes(b"")
    rows = prepared.read("train", 0, np.array([0]))
    assert not rows.ok[0] and rows.problems[0].file == str(tmp_path / "photos/a.png")


def test_mirrored_latents_are_drawn_where_the_file_holds_them(tmp_path: Path) -> None:
    prepared_dir = tmp_path / "prepared"
    _prepare(settings_of(prepared_dir, _source(tmp_path)))
    prepared = PreparedSet.open(prepared_dir)
    for bucket, count in enumerate(prepared.rows_per_bucket("train")):
        rows = prepared.read(
            "train", bucket, np.arange(count), choose_view=lambda key, repeat, centred: View(centred, True)
        )
        assert rows.ok.all() and rows.latents is not None
        for i, key in enumerate(rows.keys):
            number = int(key[-3:])
            height, width = BUCKETS[number % 2]
            stored = latents_of(number, (height, width)).astype(np.float16)
            bare = number % 4 == 3
            np.testing.assert_array_equal(rows.latents[i], stored if bare else stored[:, :, ::-1])
            # Stored is a right edge of 3 + width; as the mirrored crop begins left of the image, 0.
            assert rows.sizes[i].tolist() == ([height, width, 0, 0] if bare else [200, 300, 5, 0]) + [height, width]


def test_what_is_no_regular_file_any_more_is_a_bad_row(tmp_path: Path) -> None:
    settings = settings_of(tmp_path / "prepared", _source(tmp_path, n=8))
    _prepare(settings)
    (tmp_path / "latents/set/000.npz").unlink()
    os.mkfifo(tmp_path / "latents/set/000.npz")
    (tmp_path / "latents/set/002.npz").unlink()
    (tmp_path / "latents/set/002.npz").symlink_to("/dev/zero")
    prepared = PreparedSet.open(settings.prepared)
    rows = [prepared.read("train", b, np.arange(n)) for b, n in enumerate(prepared.rows_per_bucket("train"))]
    assert sum(int(some.ok.sum()) for some in rows) == 6
    reasons = {problem.file[-7:]: problem.reason for some in rows for problem in some.problems}
    assert reasons == {"000.npz": "is a FIFO, not a regular file", "002.npz": "is a device, not a regular file"}


def test_a_file_stays_open_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other threads may have opened so many others meanwhile that it is no longer kept; with room for none it never
    is."""
    (tmp_path / "a.tar").write_bytes(b"0123456789")
    monkeypatch.setattr(references, "OPEN_FILES", 0)
    reader = references.ReferencedFiles()
    assert reader.read(references.Reference(str(tmp_path / "a.tar"), 2, 3, (0, 0))) == b"234"

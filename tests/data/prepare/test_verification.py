"""Re-reading a prepared set: any flipped bit is found and told, and what is whole is not."""

import json
import os
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.data.kohya_files import entry, kohya_npz, settings_of, write_files, write_metadata
from tests.data.small_set import write_small_set
from trainer.cli.main import main
from trainer.config.sections.data.sources import KohyaJsonSource
from trainer.data.buckets import Bucket
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import plan_prepare
from trainer.data.prepare.verification import VERIFY_BAD, Damage, Verified, verify
from trainer.data.store.shards import RowBatch, ShardHead, read_info, write_shard
from trainer.data.store.snapshot import PreparedSet, ShardSummary
from trainer.data.store.snapshot_file import ShardEntry, Snapshot, snapshot_to_json
from trainer.errors import UserError

SQUARE, TALL = Bucket(64, 64), Bucket(128, 64)
ROW_BYTES = 4 * 8 * 8 * 2


def _verified(root: Path) -> Verified:
    return verify(PreparedSet.open(root), 2, lambda *_: None)


def _flip(file: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 1 << bit
    file.write_bytes(content)


@pytest.mark.e2e
def test_a_whole_set_is_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 8, TALL: 6}, repeats=3)
    (root / VERIFY_BAD).write_text("of an earlier time\n")
    assert main(["verify", str(root)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("read 14 images, ") and out[1] == "all checksums agree"
    assert not (root / VERIFY_BAD).exists()


@pytest.mark.e2e
def test_every_damage_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 20, TALL: 6}, repeats=2)
    _flip(root / "64x64-0.safetensors", 4096 + 3 * ROW_BYTES)
    _flip(root / "64x64-5.safetensors", 20)  # in the header
    (root / "64x64-10.safetensors").unlink()
    shard = root / "128x64-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert main(["verify", str(root)]) == 1
    records = [json.loads(line) for line in (root / VERIFY_BAD).read_text().splitlines()]
    by_file = {record.pop("file"): record for record in records}
    assert by_file.pop("64x64-0.safetensors") == {
        "row": 3,
        "offset": 4096 + 3 * ROW_BYTES,
        "images": 1,
        "reason": "checksum mismatch in the latents",
    }
    assert {name: (record["row"], record["images"]) for name, record in by_file.items()} == dict.fromkeys(
        ["64x64-5.safetensors", "64x64-10.safetensors", "128x64-0.safetensors"], (-1, 5)
    )
    out = capsys.readouterr().out
    assert "64x64-0.safetensors: row 3, byte 5,632: checksum mismatch in the latents\n" in out
    assert "16 of 26 images cannot be read" in out


def test_any_flipped_bit_is_found(tmp_path: Path) -> None:
    """Each section of a shard, and 40 places at random; the reader of training leaves out the same rows."""
    root = write_small_set(tmp_path / "whole", {SQUARE: 5})
    size = (root / "64x64-0.safetensors").stat().st_size
    header_end = 4096 + 5 * ROW_BYTES
    draw = random.Random(3)
    offsets = [0, 8, 4095, 4096, header_end - 1, *range(header_end, size, 23), size - 1]
    offsets += [draw.randrange(size) for _ in range(40)]
    broken = tmp_path / "broken"
    shutil.copytree(root, broken)
    clean = (root / "64x64-0.safetensors").read_bytes()
    for offset in offsets:
        (broken / "64x64-0.safetensors").write_bytes(clean)
        _flip(broken / "64x64-0.safetensors", offset, draw.randrange(8))
        rows = PreparedSet.open(broken).read("train", 0, np.arange(5))
        # A caption's end is the next one's beginning.
        assert len(rows.problems) in ((1, 2) if offset >= 4096 else (5,)), offset
    assert _verified(broken).damages == len(rows.problems)


@pytest.mark.e2e
def test_damage_of_the_list_of_what_was_left_out_costs_no_image(tmp_path: Path) -> None:
    head = ShardHead(TALL, "train", 1, 0.13025, "xxh3:00")
    latents = np.zeros((2, *head.latent_shape), dtype=np.float16)
    sizes = np.zeros((2, 6), dtype=np.uint32)
    batch = RowBatch(latents, ["{}", "{}"], ["a", "b"], sizes, np.array([1, 2], dtype=np.uint32))
    with (tmp_path / "0.safetensors").open("wb") as file:
        write_shard(file, head, [batch], [{"path": "x", "reason": "torn"}])
    entry = ShardEntry("0.safetensors", "train", TALL, read_info(tmp_path / "0.safetensors"))
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots/000001.json").write_text(snapshot_to_json(Snapshot(1, (1,), {}, (entry,))))
    (tmp_path / "CURRENT").write_text("000001.json")
    assert _verified(tmp_path).damages == 0  # rows that are repeated differently are read once each
    _flip(tmp_path / "0.safetensors", (tmp_path / "0.safetensors").stat().st_size - 3)
    found = _verified(tmp_path)
    assert (found.images, found.damaged_images) == (2, 0)
    assert found.first == (Damage("0.safetensors", -1, -1, 0, "checksum mismatch in excluded_bytes"),)


@pytest.mark.e2e
def test_latents_used_where_they_lie_are_read_too(tmp_path: Path) -> None:
    files = {f"{i:02d}.npz": kohya_npz(i) for i in range(20)}
    write_files(tmp_path / "latents", files)
    write_metadata(tmp_path / "meta.json", {f"{i:02d}": entry(i) for i in range(20)})
    source = KohyaJsonSource(type="kohya_json", path=tmp_path / "meta.json", latents=tmp_path / "latents")
    settings = settings_of(tmp_path / "prepared", source)
    plan_prepare(settings, show_progress=False)
    encode_shards(settings.prepared, 0, 1, encode=None)
    commit(settings.prepared)
    found = _verified(settings.prepared)
    assert (found.images, found.damages) == (20, 0) and found.num_bytes > sum(map(len, files.values()))
    (tmp_path / "latents/07.npz").write_bytes(files["07.npz"][:-3])
    (damage,) = _verified(settings.prepared).first
    assert (damage.file, damage.images) == (str(tmp_path / "latents/07.npz"), 1) and "cut off" in damage.reason
    shutil.rmtree(tmp_path / "latents")
    found = _verified(settings.prepared)
    assert found.damaged_images == 20 and found.damages == len(PreparedSet.open(settings.prepared).shards("train"))
    assert "No such file or directory, such as " in found.first[0].reason


def test_what_is_not_there_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 2
    assert "holds no prepared data set" in capsys.readouterr().err
    assert main(["verify", str(tmp_path), "data.workers=1"]) == 2
    assert "only a config has values to replace" in capsys.readouterr().err


def _die(shard: ShardSummary) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.e2e
def test_a_killed_process_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 8})
    monkeypatch.setattr("trainer.data.prepare.verification._verify_shard", _die)
    with pytest.raises(UserError, match="a process that reads has died"):
        _verified(root)

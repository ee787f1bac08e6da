"""Reading a prepared set by row number: repeats, damage, many open files, threads, pickling."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tests.data.records import caption_text
from trainer.data.buckets import Bucket
from trainer.data.captions import caption_record
from trainer.data.catalog.settings import replace_file
from trainer.data.store import snapshot as snapshot_module
from trainer.data.store.rows import RowProblem
from trainer.data.store.shards import RowBatch, ShardHead, read_info, write_shard
from trainer.data.store.snapshot import PreparedSet
from trainer.data.store.snapshot_file import ShardEntry, Snapshot, snapshot_to_json
from trainer.errors import UserError

TALL, WIDE = Bucket(128, 64), Bucket(64, 128)


def _prepare(root: Path, shards: list[tuple[str, Bucket, list[int]]]) -> None:
    """A shard for each (split, bucket, repeats of its rows); a row's latents are all `100 x shard + row`."""
    entries = []
    (root / "snapshots").mkdir(parents=True)
    for number, (split, bucket, repeats) in enumerate(shards):
        rows = range(len(repeats))
        head = ShardHead(bucket, split, 1, 0.13025, "xxh3:00")
        batch = RowBatch(
            np.stack([np.full(head.latent_shape, 100 * number + row, dtype=np.float16) for row in rows]),
            [caption_record(f"caption {number} {row}").decode() for row in rows],
            [f"photos/{number}-{row}" for row in rows],
            np.array([[row, 1, 2, 3, bucket.height_px, bucket.width_px] for row in rows], dtype=np.uint32),
            np.array(repeats, dtype=np.uint32),
        )
        name = f"{number}.safetensors"
        with (root / name).open("wb") as file:
            write_shard(file, head, [batch], [])
        entries.append(ShardEntry(name, split, bucket, read_info(root / name)))
    replace_file(root / "snapshots" / "000001.json", snapshot_to_json(Snapshot(1, (1,), {}, tuple(entries))))
    replace_file(root / "CURRENT", "000001.json\n")


def test_rows_by_virtual_number(tmp_path: Path) -> None:
    _prepare(
        tmp_path,
        [
            ("train", WIDE, [1, 1, 1]),
            ("train", TALL, [2, 2]),
            ("validation", WIDE, [1]),
            ("train", TALL, [1, 3, 2]),
            ("train", TALL, [1]),
        ],
    )
    prepared = pickle.loads(pickle.dumps(PreparedSet.open(tmp_path)))
    assert prepared.buckets("train") == [WIDE, TALL] and prepared.buckets("validation") == [WIDE]
    assert prepared.rows_per_bucket("train") == [3, 11] and prepared.images("train") == 9
    expected = [(1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1), (3, 0, 0), (3, 1, 0), (3, 1, 1), (3, 1, 2), (3, 2, 0)]
    expected += [(3, 2, 1), (4, 0, 0)]
    ids = np.random.default_rng(0).permutation(11)
    rows = prepared.read("train", 1, ids)
    assert rows.ok.all() and not rows.problems and rows.latents.shape == (11, 4, 16, 8)
    for i, virtual in enumerate(ids):
        shard, row, repeat = expected[virtual]
        assert (rows.latents[i] == 100 * shard + row).all()
        assert rows.keys[i] == f"photos/{shard}-{row}" and rows.repeat[i] == repeat
        assert caption_text(rows.captions[i]) == f"caption {shard} {row}"
        assert rows.sizes[i].tolist() == [row, 1, 2, 3, 128, 64]
        record = prepared.read_record("train", 1, int(virtual))
        assert record is not None and (record.key, record.caption) == (rows.keys[i], rows.captions[i])


def test_padding_and_a_buffer_of_the_callers(tmp_path: Path) -> None:
    _prepare(tmp_path, [("train", WIDE, [1, 1])])
    buffer = np.full((3, 4, 8, 16), 7, dtype=np.float16)
    rows = PreparedSet.open(tmp_path).read("train", 0, np.array([1, -1, 0]), buffer)
    assert rows.latents is buffer
    assert rows.ok.tolist() == [True, False, True] and not rows.problems
    assert buffer[:, 0, 0, 0].tolist() == [1, 0, 0]
    with pytest.raises(IndexError):
        PreparedSet.open(tmp_path).read("train", 0, np.array([2]))


def test_damage_costs_its_row_only(tmp_path: Path) -> None:
    _prepare(tmp_path, [("train", WIDE, [1] * 4), ("train", WIDE, [1] * 4), ("train", WIDE, [1] * 4)])
    prepared = PreparedSet.open(tmp_path)
    assert prepared.read("train", 0, np.arange(12)).ok.all()
    with (tmp_path / "0.safetensors").open("r+b") as file:
        file.seek(4096 + 2 * 1024 + 77)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))
    (tmp_path / "1.safetensors").unlink()
    rows = PreparedSet.open(tmp_path).read("train", 0, np.arange(12))
    assert rows.ok.tolist() == [True, True, False, True, *[False] * 4, *[True] * 4]
    assert (rows.latents[2] == 0).all() and rows.captions[2] == rows.keys[2] == ""
    reason = "checksum mismatch in the latents"
    assert rows.problems[0] == RowProblem("0.safetensors", 2, 4096 + 2 * 1024, reason)
    assert [(problem.file, problem.row) for problem in rows.problems[1:]] == [("1.safetensors", i) for i in range(4)]
    assert PreparedSet.open(tmp_path).missing() == [("1.safetensors: is missing", 4)]


def test_few_descriptors_and_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot_module, "OPEN_FILES", 3)
    _prepare(tmp_path, [("train", WIDE, [1] * 5)] * 12)
    prepared = PreparedSet.open(tmp_path)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))

    def read(seed: int) -> bool:
        ids = np.random.default_rng(seed).permutation(60)
        rows = prepared.read("train", 0, ids)
        return bool(rows.ok.all() and (rows.latents[:, 0, 0, 0] == ids // 5 * 100 + ids % 5).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(40)))
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors + 3


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sdxl-train prepare"):
        PreparedSet.open(tmp_path)
    with pytest.raises(UserError, match="no such snapshot"):
        PreparedSet.open(tmp_path, "000007.json")

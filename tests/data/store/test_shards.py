"""A shard file: what goes in comes out, standard readers open it, and every flipped bit is found."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors

from tests.data.records import caption_text
from trainer.data.buckets import Bucket
from trainer.data.captions import caption_record
from trainer.data.store.shard_reader import OpenShard, read_row
from trainer.data.store.shards import (
    HEADER_BYTES,
    RowBatch,
    ShardError,
    ShardHead,
    finite_f16,
    read_info,
    write_shard,
)

HEAD = ShardHead(Bucket(64, 128), "train", 3, 0.13025, "xxh3:00 fp32")
CAPTIONS = ["a cat", "", "zwei Hunde ☕\nzweite Zeile", "x" * 700, "e"]


def _batches(latents: np.ndarray) -> list[RowBatch]:
    return [
        RowBatch(
            latents[part],
            [caption_record(CAPTIONS[i]).decode() for i in part],
            [f"photos/ü{i}" for i in part],
            np.array([[i, 2, 3, 4, 64, 128] for i in part], dtype=np.uint32),
            np.array([i + 1 for i in part], dtype=np.uint32),
        )
        for part in ([0, 1], [2, 3], [4])
    ]


def _encode_text(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.array([len(caption_text(caption)) for caption in captions], dtype=np.float32)
    return np.full((len(captions), 77, 6), lengths[:, None, None]), np.full((len(captions), 5), -lengths[:, None])


def _write(path: Path, with_text: bool) -> np.ndarray:
    latents = np.random.default_rng(0).standard_normal((5, 4, 8, 16)).astype(np.float16)
    excluded = [{"path": "/x/bad.jpg", "reason": "is empty"}]
    with path.open("wb") as file:
        write_shard(file, HEAD, _batches(latents), excluded, _encode_text if with_text else None, text_batch_size=2)
    return latents


def _open(path: Path) -> OpenShard:
    info = read_info(path)
    return OpenShard(path, info.rows, info.offsets, info.file_bytes, info.header_crc32c)


@pytest.mark.parametrize("with_text", [False, True])
def test_rows_come_back(tmp_path: Path, with_text: bool) -> None:
    path = tmp_path / "a.safetensors"
    latents = _write(path, with_text)
    info = read_info(path)
    assert (info.rows, info.virtual_rows, info.uniform_repeats) == (5, 15, 0)
    assert info.excluded == ({"path": "/x/bad.jpg", "reason": "is empty"},)
    assert info.text_shape == ((77, 6, 5) if with_text else None)
    assert info.offsets["latents"] == HEADER_BYTES == 4096
    shard = _open(path)
    assert shard.ends_of_repeats(15).tolist() == [1, 3, 6, 10, 15]
    for i in (4, 0, 2, 1, 3):
        buffer = np.empty((4, 8, 16), dtype=np.float16)
        text = (np.empty((77, 6), dtype=np.float16), np.empty(5, dtype=np.float16)) if with_text else None
        record = read_row(shard, i, buffer, text)
        assert np.array_equal(buffer, latents[i])
        assert json.loads(record.caption) == {"caption": CAPTIONS[i]}
        assert record.key == f"photos/ü{i}"
        assert record.sizes.tolist() == [i, 2, 3, 4, 64, 128]
        if text:
            assert (text[0] == len(CAPTIONS[i])).all() and (text[1] == -len(CAPTIONS[i])).all()


@pytest.mark.parametrize("framework", ["numpy", "pt"])
def test_safetensors_opens_it(tmp_path: Path, framework: str) -> None:
    path = tmp_path / "a.safetensors"
    latents = _write(path, with_text=True)
    with safetensors.safe_open(path, framework=framework) as file:
        assert file.metadata()["bucket"] == "64x128" and file.metadata()["scaling_factor"] == "0.13025"
        assert np.array_equal(np.asarray(file.get_tensor("latents")), latents)
        keys, ends = bytes(file.get_tensor("key_bytes")), file.get_tensor("key_offsets")
        assert keys[int(ends[1]) : int(ends[2])].decode() == "photos/ü1"
        assert tuple(file.get_tensor("text_hidden").shape) == (5, 77, 6)


def test_an_empty_shard(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        write_shard(file, HEAD, [], [{"path": "p", "reason": "r"}])
    assert read_info(path).rows == read_info(path).virtual_rows == 0
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.get_tensor("latents").shape == (0, 4, 8, 16)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Whatever byte is damaged: some row, the file itself or its list of left-out images reports it."""
    path = tmp_path / "a.safetensors"
    _write(path, with_text=True)
    info, intact = read_info(path), path.read_bytes()
    starts = sorted(offset for offset in info.offsets.values())
    rng = np.random.default_rng(0)
    spots = [*starts, *(start - 1 for start in starts[1:]), *rng.integers(0, len(intact), 300), len(intact) - 1, 8]
    for spot in spots:
        damaged = bytearray(intact)
        damaged[spot] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert _problems(path, info.offsets, len(intact), info.header_crc32c), f"byte {spot}"
    path.write_bytes(intact)
    assert not _problems(path, info.offsets, len(intact), info.header_crc32c)
    path.write_bytes(intact[:-1])
    assert _problems(path, info.offsets, len(intact), info.header_crc32c)


def _problems(path: Path, offsets: dict[str, int], file_bytes: int, header_crc: int) -> list[str]:
    problems = []
    try:
        shard = OpenShard(path, 5, offsets, file_bytes, header_crc)
    except ShardError as error:
        return [str(error)]
    for i in range(5):
        text = (np.empty((77, 6), dtype=np.float16), np.empty(5, dtype=np.float16))
        try:
            read_row(shard, i, np.empty((4, 8, 16), dtype=np.float16), text)
        except ShardError as error:
            problems.append(f"{i}: {error}")
    if not problems:
        try:
            read_info(path)
        except ShardError as error:
            problems.append(str(error))
    return problems


def test_values_beyond_fp16_are_refused() -> None:
    assert finite_f16(np.array([65504.0, -1.0])).dtype == np.float16
    for value in (70000.0, np.inf, np.nan):
        with pytest.raises(ValueError, match="fp16"):
            finite_f16(np.array([0.0, value]))

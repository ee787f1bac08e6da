"""Prepared data sets of any size for measurements, written by the same code as real ones.

Latents are either holes in a sparse file (zeros that take no room on the disk, for measurements of memory and of the
index) or cut from a pool of random numbers (for measurements of the drive). Captions are words, some 700 bytes each.
"""

import io
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from trainer.data.buckets import Bucket, make_buckets
from trainer.data.captions import caption_record
from trainer.data.settings import replace_file
from trainer.data.shards import RowBatch, ShardHead, read_info, write_shard
from trainer.data.snapshot_file import ShardEntry, Snapshot, snapshot_name, snapshot_to_json

ROWS_PER_SHARD = 4096
CAPTION_BYTES = 700
_AT_ONCE = 64
_POOL_BYTES = 64 << 20


@dataclass(frozen=True)
class _Part:
    """A shard to be written."""

    root: Path
    bucket: Bucket
    index: int
    rows: int
    holes: bool


def write_synthetic_set(root: Path, rows: int, *, holes: bool, resolution: int = 1024, processes: int = 2) -> None:
    """Write `rows` rows into some 40 buckets of very different sizes; the same rows each time."""
    random = np.random.default_rng(0)
    buckets = make_buckets(resolution, resolution // 2, 2 * resolution, 64)
    shares = random.dirichlet(np.full(len(buckets), 0.7))
    counts = np.floor(shares * rows).astype(int)
    counts[counts.argmax()] += rows - counts.sum()
    parts = [
        _Part(root, bucket, index, min(ROWS_PER_SHARD, count - begin), holes)
        for bucket, count in zip(buckets, counts.tolist(), strict=True)
        for index, begin in enumerate(range(0, count, ROWS_PER_SHARD))
    ]
    (root / "shards/000001").mkdir(parents=True)
    (root / "snapshots").mkdir()
    with ProcessPoolExecutor(processes) as pool:
        entries = tuple(pool.map(_write, parts, chunksize=4))
    snapshot = Snapshot(1, (1,), {"the VAE's scaling_factor": 0.13025}, entries)
    replace_file(root / "snapshots" / snapshot_name(1), snapshot_to_json(snapshot))
    replace_file(root / "CURRENT", snapshot_name(1) + "\n")


def _write(part: _Part) -> ShardEntry:
    bucket = part.bucket
    name = f"shards/000001/train-{bucket.height_px}x{bucket.width_px}-{part.index:06d}.safetensors"
    head = ShardHead(bucket, "train", 1, 0.13025, "xxh3:00")
    seed = (bucket.height_px, bucket.width_px, part.index)
    with (part.root / name).open("wb", buffering=1 << 20) as file:
        write_shard(_Holes(file) if part.holes else file, head, _batches(part, head, seed), [])
    return ShardEntry(name, "train", bucket, read_info(part.root / name))


def _batches(part: _Part, head: ShardHead, seed: tuple[int, ...]) -> Iterator[RowBatch]:
    random = np.random.default_rng(seed)
    text = _text(random)
    row_bytes = 2 * int(np.prod(head.latent_shape))
    pool = None if part.holes else random.bytes(_POOL_BYTES)
    bucket = part.bucket
    for begin in range(0, part.rows, _AT_ONCE):
        keys = range(begin, min(begin + _AT_ONCE, part.rows))
        n = len(keys)
        if pool is None:
            latents = _zeros(_AT_ONCE, head.latent_shape)[:n]
        else:
            at = random.integers(0, _POOL_BYTES - row_bytes, n)
            latents = np.stack([np.frombuffer(pool, "<f2", row_bytes // 2, a // 2 * 2) for a in at.tolist()])
            latents = latents.reshape(n, *head.latent_shape)
        lengths = np.clip(random.normal(CAPTION_BYTES - 15, 150, n), 0, 2000).astype(int).tolist()
        starts = random.integers(0, len(text) - 2000, n).tolist()
        scale = np.exp(random.normal(0.45, 0.45, n))
        hw = np.array([[bucket.height_px, bucket.width_px]]) * scale[:, None] * np.exp(random.normal(0, 0.05, (n, 2)))
        sizes = np.zeros((n, 6), dtype=np.uint32)
        sizes[:, :2], sizes[:, 4:] = hw, (bucket.height_px, bucket.width_px)
        yield RowBatch(
            latents=latents,
            captions=[caption_record(text[s : s + length]).decode() for s, length in zip(starts, lengths, strict=True)],
            keys=[f"synthetic/{bucket.height_px}x{bucket.width_px}/{part.index:04d}/{key:06d}" for key in keys],
            sizes=sizes,
            repeats=np.ones(n, dtype=np.uint32),
        )


@lru_cache(1)
def _zeros(n: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros((n, *shape), dtype="<f2")


def _text(random: np.random.Generator) -> str:
    """Half a megabyte of words of 1 to 9 letters."""
    letters = random.choice(list("aaaeeeiiooutnrshdlcmfgpwyb"), 500_000)
    letters[np.cumsum(random.integers(2, 11, 90_000))[:-1].clip(max=499_999)] = " "
    return "".join(letters)


class _Holes(io.BufferedIOBase):
    """A file in which blocks of zeros are not written but passed over."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self._file = file

    def write(self, data: object, /) -> int:
        view = memoryview(data).cast("B")  # type: ignore[arg-type]
        if len(view) >= 4096 and len(view) % 8 == 0 and not np.frombuffer(view, dtype=np.uint64).any():
            self._file.seek(len(view), os.SEEK_CUR)
            return len(view)
        return self._file.write(view)

    def seek(self, offset: int, whence: int = 0, /) -> int:
        return self._file.seek(offset, whence)

    def flush(self) -> None:
        self._file.flush()

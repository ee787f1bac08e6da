"""Prepared data sets of any size for measurements, written by the same code as real ones.

A row's latents are either a hole in a sparse file (zeros that take no room on the disk, for measurements of memory and
of the index), or cut from a pool of random numbers (for measurements of the drive), or kohya's `.npz` in a file of its
own, or one `.npz` that many rows share under different names. Captions are words, some 700 bytes each.
"""

import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np

from trainer.config.sections.data.sources import FolderSource, KohyaJsonSource
from trainer.data.buckets import Bucket, BucketRules, make_buckets
from trainer.data.captions import caption_record
from trainer.data.catalog.settings import PrepareSettings, replace_file
from trainer.data.sources.source import WHOLE
from trainer.data.store.references import Reference
from trainer.data.store.shards import RowBatch, ShardHead, read_info, write_shard
from trainer.data.store.snapshot_file import ShardEntry, Snapshot, snapshot_name, snapshot_to_json

ROWS_PER_SHARD = 4096
CAPTION_BYTES = 700
_AT_ONCE = 64
_POOL_BYTES = 64 << 20
_LINKS = 20_000  # names of one file: ext4 allows 65,000


@dataclass(frozen=True)
class _Part:
    """A shard to be written."""

    root: Path
    bucket: Bucket
    index: int
    rows: int
    payload: Literal["hole", "random", "npz", "shared npz"]
    with_tags: bool = False


def stand_in_tokens(captions: Sequence[str]) -> np.ndarray:
    """Token ids [B, 2, 77] int64 at no cost: the tokenizers' time and memory are not the data engine's."""
    ids = np.zeros((len(captions), 2, 77), dtype=np.int64)
    ids[:, :, 0] = np.array([len(caption) for caption in captions])[:, None]
    return ids


def write_synthetic_set(root: Path, rows: int, *, holes: bool, resolution: int = 1024, with_tags: bool = False) -> None:
    """Write `rows` rows into some 40 buckets of very different sizes; the same rows each time.

    Args:
        with_tags: each row has half a caption, and its words as tags as well.
    """
    _write_set(root, rows, resolution, "hole" if holes else "random", with_tags)


def write_npz_set(root: Path, rows: int, *, shared: bool = False) -> None:
    """The same with kohya's `.npz` in place of our latents; with `shared`, all rows of a bucket have the same."""
    _write_set(root, rows, 1024, "shared npz" if shared else "npz")


def _write_set(
    root: Path,
    rows: int,
    resolution: int,
    payload: Literal["hole", "random", "npz", "shared npz"],
    with_tags: bool = False,
) -> None:
    random = np.random.default_rng(0)
    buckets = make_buckets(resolution, resolution // 2, 2 * resolution, 64)
    counts = np.floor(random.dirichlet(np.full(len(buckets), 0.7)) * rows).astype(int)
    counts[counts.argmax()] += rows - counts.sum()
    parts = [
        _Part(root, bucket, index, min(ROWS_PER_SHARD, count - begin), payload, with_tags)
        for bucket, count in zip(buckets, counts.tolist(), strict=True)
        for index, begin in enumerate(range(0, count, ROWS_PER_SHARD))
    ]
    (root / "shards/000001").mkdir(parents=True)
    (root / "snapshots").mkdir()
    if payload == "shared npz":
        for bucket in {part.bucket for part in parts}:
            folder = root / "npz" / _name(bucket)
            folder.mkdir(parents=True)
            _write_npz(folder / "000000.npz", bucket, random)
            for number in range(1, min(int(counts.max()), ROWS_PER_SHARD)):
                os.link(folder / "000000.npz", folder / f"{number:06d}.npz")
    with ProcessPoolExecutor(2) as pool:
        entries = tuple(pool.map(_write, parts, chunksize=4))
    snapshot = Snapshot(1, (1,), {"the VAE's scaling_factor": 0.13025}, entries)
    replace_file(root / "snapshots" / snapshot_name(1), snapshot_to_json(snapshot))
    replace_file(root / "CURRENT", snapshot_name(1) + "\n")


def _name(bucket: Bucket) -> str:
    return f"{bucket.height_px}x{bucket.width_px}"


def _write(part: _Part) -> ShardEntry:
    bucket = part.bucket
    name = f"shards/000001/train-{_name(bucket)}-{part.index:06d}.safetensors"
    head = ShardHead(bucket, "train", 1, 0.13025, "xxh3:00", "npz" if "npz" in part.payload else "latents")
    with (part.root / name).open("wb", buffering=1 << 20) as file:
        write_shard(_Holes(file) if part.payload == "hole" else file, head, _batches(part, head), [])  # type: ignore[arg-type]
    return ShardEntry(name, "train", bucket, read_info(part.root / name))


def _batches(part: _Part, head: ShardHead) -> Iterator[RowBatch]:
    bucket = part.bucket
    random = np.random.default_rng((bucket.height_px, bucket.width_px, part.index))
    text = _text()
    pool = random.bytes(_POOL_BYTES) if part.payload == "random" else b""
    for begin in range(0, part.rows, _AT_ONCE):
        rows = range(begin, min(begin + _AT_ONCE, part.rows))
        n = len(rows)
        lengths = np.clip(random.normal(CAPTION_BYTES - 15, 150, n), 0, 2000).astype(int).tolist()
        starts = random.integers(0, len(text) - 2000, n).tolist()
        scale = np.exp(random.normal(0.45, 0.45, n))
        hw = np.array([[bucket.height_px, bucket.width_px]]) * scale[:, None] * np.exp(random.normal(0, 0.05, (n, 2)))
        sizes = np.zeros((n, 6), dtype=np.uint32)
        sizes[:, :2], sizes[:, 4:] = hw, (bucket.height_px, bucket.width_px)
        latents = None
        if part.payload == "hole":
            latents = _zeros(_AT_ONCE, head.latent_shape)[:n]
        elif part.payload == "random":
            latents = _cut(pool, n, head.latent_shape, random)
        yield RowBatch(
            latents=latents,
            captions=[_record(text[s : s + length], part.with_tags) for s, length in zip(starts, lengths, strict=True)],
            keys=[f"synthetic/{_name(bucket)}/{part.index:04d}/{row:06d}" for row in rows],
            sizes=sizes,
            repeats=np.ones(n, dtype=np.uint32),
            references=[] if latents is not None else [_npz(part, row, random) for row in rows],
        )


def _record(text: str, with_tags: bool) -> str:
    half = len(text) // 2
    return (caption_record(text[:half], ", ".join(text[half:].split())) if with_tags else caption_record(text)).decode()


def _cut(pool: bytes, n: int, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    count = int(np.prod(shape))
    at = random.integers(0, _POOL_BYTES // 2 - count, n).tolist()
    return np.stack([np.frombuffer(pool, "<f2", count, 2 * a) for a in at]).reshape(n, *shape)


def _npz(part: _Part, row: int, random: np.random.Generator) -> Reference:
    folder = part.root / "npz" / _name(part.bucket)
    path = folder / f"{row:06d}.npz"
    if part.payload == "npz":
        path = folder / f"{part.index:04d}-{row:06d}.npz"
        folder.mkdir(parents=True, exist_ok=True)
        _write_npz(path, part.bucket, random)
    return Reference(str(path), 0, WHOLE, (0, 0))


def _write_npz(path: Path, bucket: Bucket, random: np.random.Generator) -> None:
    shape = 4, bucket.height_px // 8, bucket.width_px // 8
    np.savez(
        path,
        latents=random.standard_normal(shape, dtype=np.float32),
        original_size=np.array([2 * bucket.width_px, 2 * bucket.height_px]),
        crop_ltrb=np.array([0, 0, bucket.width_px, bucket.height_px]),
    )


def write_metadata_file(folder: Path, entries: int, text_bytes: int = 2 * CAPTION_BYTES // 3) -> int:
    """kohya's metadata of so many images, and an `.npz` for each (links to a few); returns the metadata's bytes.

    Args:
        text_bytes: of each image's caption, and of its tags.
    """
    (folder / "npz").mkdir(parents=True)
    bucket, random, text, first = Bucket(64, 64), np.random.default_rng(0), _text(), Path()
    with (folder / "meta_lat.json").open("w", encoding="utf-8") as file:
        file.write("{")
        for number in range(entries):
            directory, within = divmod(number, _LINKS)
            path = folder / f"npz/{directory:04d}/{within:08d}.npz"
            if within == 0:
                path.parent.mkdir()
                first = path
                _write_npz(path, bucket, random)
            else:
                os.link(first, path)
            at = int(random.integers(0, len(text) - 2000))
            fields = {"tags": text[at : at + text_bytes], "caption": text[at + 900 : at + 900 + text_bytes]}
            fields |= {"train_resolution": [64, 64], "image_size": [640, 480]}
            key = f"{directory:04d}/{within:08d}"
            file.write(("," if number else "") + f'\n  "{key}": ' + json.dumps(fields, indent=4))
        file.write("\n}\n")
    return (folder / "meta_lat.json").stat().st_size


def metadata_settings(folder: Path) -> PrepareSettings:
    """To prepare what `write_metadata_file` wrote, the latents used where they lie."""
    return PrepareSettings(
        prepared=folder / "prepared",
        sources=(KohyaJsonSource(type="kohya_json", path=folder / "meta_lat.json", latents=folder / "npz"),),
        buckets=BucketRules(resolution=64, min_px=64, max_px=64, step_px=64),
        vae="",
        scaling_factor=0.13025,
    )


def photo_settings(photos: Path, prepared: Path) -> PrepareSettings:
    """Small buckets and small shards, so that a short run has many of them to be interrupted in."""
    return PrepareSettings(
        prepared=prepared,
        sources=(FolderSource(path=photos, repeats=2),),
        buckets=BucketRules(resolution=256, min_px=128, max_px=512, step_px=64),
        vae="stand-in",
        scaling_factor=0.13025,
        validation_fraction=0.1,
        rows_per_shard=16,
    )


def stand_in_vae(pixels: np.ndarray, draw_seeds: np.ndarray) -> np.ndarray:
    """[B, 3, H, W] -> [B, 4, H/8, W/8]: means of 8 x 8 pixels, and noise of each sample's own."""
    b, _, height, width = pixels.shape
    means = pixels.reshape(b, 3, height // 8, 8, width // 8, 8).mean(axis=(3, 5)) / 127.5 - 1
    noise = [np.random.default_rng(seed).standard_normal((1, height // 8, width // 8)) for seed in draw_seeds]
    return np.concatenate([means, np.stack(noise)], axis=1).astype(np.float32)


@lru_cache(1)
def _zeros(n: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros((n, *shape), dtype="<f2")


@lru_cache(1)
def _text() -> str:
    """Half a megabyte of words of 1 to 9 letters."""
    random = np.random.default_rng(0)
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

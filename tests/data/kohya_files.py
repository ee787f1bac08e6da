"""Metadata, `.npz` latents and tars as other programs write them, for tests."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.sections.data.sources import Source
from trainer.data.buckets import BucketRules
from trainer.data.catalog.settings import PrepareSettings


def latents_of(seed: int, bucket_hw: tuple[int, int] = (64, 128)) -> np.ndarray:
    """Random latents f32 [4, h, w] of a bucket."""
    height, width = bucket_hw
    return np.random.default_rng(seed).normal(size=(4, height // 8, width // 8)).astype(np.float32)


def npz_bytes(compressed: bool = False, **arrays: Any) -> bytes:
    """What `np.savez` writes."""
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def kohya_npz(seed: int, bucket_hw: tuple[int, int] = (64, 128), original_wh: tuple[int, int] = (300, 200)) -> bytes:
    """An `.npz` with all that kohya writes."""
    return npz_bytes(
        latents=latents_of(seed, bucket_hw),
        original_size=np.array(original_wh),
        crop_ltrb=np.array([3.0, 5.0, 3.0 + bucket_hw[1], 5.0 + bucket_hw[0]]),
        latents_flipped=latents_of(seed, bucket_hw)[:, :, ::-1],
    )


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Files by their paths below the folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def write_metadata(path: Path, entries: dict[str, Any]) -> None:
    """As kohya's scripts write it."""
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False), encoding="utf-8")


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """A tar of members in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def entry(seed: int, bucket_hw: tuple[int, int] = (64, 128), **other: Any) -> dict[str, Any]:
    """A metadata entry; sizes in it are width, then height."""
    return {
        "tags": f"tag{seed}, solo",
        "caption": f"a picture of {seed}",
        "train_resolution": [bucket_hw[1], bucket_hw[0]],
        **other,
    }


def settings_of(prepared: Path, *sources: Source, **other: Any) -> PrepareSettings:
    """Settings for sources of latents; shards of 4 rows, of references 16."""
    return PrepareSettings(
        prepared=prepared,
        sources=sources,
        buckets=BucketRules(96, 64, 128, 32),
        vae="xxh3:00 fp32",
        scaling_factor=0.13025,
        **{"rows_per_shard": 4, **other},
    )

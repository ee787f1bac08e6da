"""Real photographs in odd and ordinary files, and a plain stand-in for the VAE's encoder."""

from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from trainer.config.sections.data.sources import FolderSource
from trainer.data.buckets import BucketRules
from trainer.data.catalog.settings import PrepareSettings

RULES = BucketRules(resolution=128, min_px=64, max_px=256, step_px=64)


def astronaut() -> Image.Image:
    return Image.fromarray(data.astronaut())  # 512 x 512


def coffee() -> Image.Image:
    return Image.fromarray(data.coffee())  # 600 x 400


def write_crops(folder: Path, count: int, seed: int = 0) -> None:
    """`count` JPEG crops of two photographs in varied shapes, each with a caption."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    photographs = [astronaut(), coffee()]
    for i in range(count):
        photograph = photographs[i % 2]
        width, height = rng.integers(70, 250, 2)
        left, top = rng.integers(0, photograph.width - width), rng.integers(0, photograph.height - height)
        name = f"crop-{seed}-{i:03d}"
        photograph.crop((left, top, left + width, top + height)).save(folder / f"{name}.jpg", quality=90)
        (folder / f"{name}.txt").write_text(f"crop {i}, a photograph ☕", encoding="utf-8")


def settings_for(prepared: Path, *folders: Path, **changes: object) -> PrepareSettings:
    values = {
        "prepared": prepared,
        "sources": tuple(FolderSource(path=folder) for folder in folders),
        "buckets": RULES,
        "vae": "xxh3:0123 fp32",
        "scaling_factor": 0.13025,
        "rows_per_shard": 5,
    }
    return PrepareSettings(**(values | changes))  # type: ignore[arg-type]


def pooled(pixels: np.ndarray, draw_seeds: np.ndarray) -> np.ndarray:
    """Means of 8 x 8 pixels in -1..1 as the first three latents, noise of each sample's own as the fourth."""
    b, _, height, width = pixels.shape
    means = (
        (np.ascontiguousarray(pixels) / np.float32(127.5) - 1)
        .reshape(b, 3, height // 8, 8, width // 8, 8)
        .mean(axis=(3, 5))
    )
    noise = [np.random.default_rng(seed).standard_normal((1, height // 8, width // 8)) for seed in draw_seeds]
    return np.concatenate([means, np.stack(noise)], axis=1).astype(np.float32)

"""What makers of hostile data have in common: sound images, ways to shake bytes, and `prepare` to the rows it gives."""

import io
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal

import numpy as np
from PIL import Image

from trainer.config.sections.data.sources import Source
from trainer.data.buckets import BucketRules
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import plan_prepare
from trainer.data.store.snapshot import PreparedSet

Bytes = tuple[Callable[[Random], bytes], ...]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n(x) (w) file closefile\nshowpage\n%%EOF\n"


@cache
def _encoded(form: str, size: tuple[int, int], options: tuple[tuple[str, Any], ...]) -> bytes:
    values = np.add.outer(np.arange(size[1]), np.arange(size[0]))[..., None] * np.array([1, 2, 3])
    file = io.BytesIO()
    Image.fromarray((values % 256).astype(np.uint8)).save(file, form, **dict(options))
    return file.getvalue()


def encoded(form: str, size: tuple[int, int] = (96, 64), **options: Any) -> bytes:
    """A sound image file of that format; size is width, then height."""
    try:
        return _encoded(form, size, tuple(options.items()))
    except TypeError:  # options that cannot be kept apart in a cache
        return _encoded.__wrapped__(form, size, tuple(options.items()))


def variant(makers: Bytes, r: Random, seed: int) -> bytes:
    """What one of the makers makes: each in turn."""
    return makers[seed % len(makers)](r)


def shaken(data: bytes, r: Random, most_bytes: int = 6) -> bytes:
    """With some bytes exchanged, and often cut off, doubled or with a piece missing; mostly near the beginning."""
    damaged = bytearray(data)
    for _ in range(r.randint(0, most_bytes)):
        damaged[min(len(data) - 1, int(r.expovariate(8 / len(data))))] = r.choice((0, 255, 127, 128, r.randrange(256)))
    at = r.randrange(len(data))
    ways = (damaged, damaged[:at], damaged + damaged, damaged[:at] + damaged[at + r.randrange(1, 99) :], damaged)
    return bytes(r.choice(ways)) or b"x"


def pooled(pixels: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """In place of a VAE: f32 [B, 4, H/8, W/8]."""
    b, c, h, w = pixels.shape
    means = pixels.reshape(b, c, h // 8, 8, w // 8, 8).mean(axis=(3, 5), dtype=np.float32) / 255
    return np.concatenate([means, means[:, :1]], axis=1)


def prepared_from(
    folder: Path,
    *sources: Source,
    sound: int = 1,
    bad: int | None = None,
    between: Callable[[], object] = lambda: None,
    mode: Literal["latents", "images"] = "latents",
) -> None:
    """Prepare the sources in `folder` and read all rows: `sound` of them must be there, `bad` (or any) left out.

    Args:
        between: what happens after the sources have been listed.
    """
    prepared = folder / "prepared"
    settings = PrepareSettings(prepared, sources, BucketRules(96, 64, 128, 32), "xxh3:00 fp32", 0.13025, mode=mode)
    plan_prepare(settings, show_progress=False)
    between()
    encode_shards(prepared, 0, 1, pooled)
    commit(prepared)
    assert read_all(prepared) >= sound
    lines = (prepared / "bad.jsonl").read_text().splitlines()
    assert all(line.isprintable() for line in lines)
    reasons = [json.loads(line)["reason"] for line in lines]
    assert all(reason and reason.isprintable() for reason in reasons), reasons
    assert bad in (None, len(reasons)), reasons
    print(*reasons, sep="\n")


def read_all(prepared: Path) -> int:
    """Read every row of a prepared set; how many are sound."""
    opened, count = PreparedSet.open(prepared), 0
    for split in ("train", "validation"):
        for bucket, rows in enumerate(opened.rows_per_bucket(split)):
            for first in range(0, rows, 8):
                found = opened.read(split, bucket, np.arange(first, min(rows, first + 8)), with_masks=True)
                count += int(found.ok.sum())
                assert all(problem.reason for problem in found.problems)
    return count


def some(sequence: Sequence[Any], seed: int) -> Any:
    """Each in turn."""
    return sequence[seed % len(sequence)]

"""The drawings of a run as small pictures that a page can hold."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

_STEPS, _IMAGES, _PX = 24, 8, 320
_QUALITY = 80
_MOST_BYTES = 1_400_000
"""Of all pictures of a page as text, which is held to 3 MB with everything else."""


def sample_images(folder: Path, most_bytes: int = _MOST_BYTES) -> list[dict[str, Any]]:
    """Drawings of evenly chosen steps, the first and the newest among them: `step`, `of` (the average that was drawn),
    `images` as small WebP, at most 24 x 8 of them. Where they are too large, there are fewer steps."""
    drawn = sorted(place for place in folder.glob("step-????????*") if place.is_dir())
    names = sorted({place.name[13:] for place in drawn})
    chosen = _evenly([place for place in drawn if place.name[13:] == names[-1]] if names else [], _STEPS)
    while True:
        found = [one for one in map(_images_of, chosen) if one["images"]]
        if len(found) <= 1 or sum(len(image) for one in found for image in one["images"]) <= most_bytes:
            return found
        chosen = _evenly(chosen, len(chosen) * 3 // 4)


def samples_key(samples: Sequence[dict[str, Any]]) -> str:
    """By which a page that has these samples tells so."""
    digest = hashlib.sha1(usedforsecurity=False)
    for one in samples:
        digest.update(f"{one['step']} {one['of']} {[*map(len, one['images'])]}".encode())
        digest.update("".join(one["images"]).encode())
    return digest.hexdigest()


def _evenly(places: list[Path], most: int) -> list[Path]:
    if len(places) <= most:
        return places
    return [places[i * (len(places) - 1) // (most - 1)] for i in range(most)] if most > 1 else places[-1:]


def _images_of(place: Path) -> dict[str, Any]:
    images = [image for file in sorted(place.glob("*.png"))[:_IMAGES] if (image := _small(file))]
    step = place.name[5:13]
    return {"step": int(step) if step.isdecimal() else 0, "of": place.name[14:], "images": images}


def _small(file: Path) -> str | None:
    """An image, small; None of what is none. A page that is asked for anew makes no image twice."""
    try:
        found = file.stat()
    except OSError:
        return None
    return _made_small(file, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=2 * _STEPS * _IMAGES)
def _made_small(file: Path, size: int, mtime_ns: int) -> str | None:
    from PIL import Image

    from trainer.guards import DEFAULT_LIMITS
    from trainer.raster import DECODE_ERRORS, open_image

    try:
        with open_image(file, DEFAULT_LIMITS) as image:
            small = image.convert("RGB")
            small.thumbnail((_PX, _PX), Image.Resampling.LANCZOS)
    except DECODE_ERRORS:
        return None
    data = io.BytesIO()
    small.save(data, format="WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()

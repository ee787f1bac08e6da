"""Metadata of a published file: Stability AI's modelspec 1.0.1, read by A1111, ComfyUI, SwarmUI and model sites."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS

PREFIX = "modelspec."
HASH_KEY = PREFIX + "hash_sha256"
THUMBNAIL_PX = 256  # the specification's recommendation
_FIXED = {
    "sai_model_spec": "1.0.1",
    "architecture": "stable-diffusion-xl-v1-base",
    "implementation": "https://github.com/Stability-AI/generative-models",
    "timestep_range": "0,1000",
}
_PREDICTION_WORDS = {"epsilon": "epsilon", "v_prediction": "v", "flow": "flow"}


@dataclass(frozen=True)
class Description:
    """What a person says about a model; None is left out of the file.

    Attributes:
        tags, merged_from: separated by commas.
    """

    title: str | None = None
    author: str | None = None
    description: str | None = None
    license: str | None = None
    tags: str | None = None
    usage_hint: str | None = None
    trigger_phrase: str | None = None
    merged_from: str | None = None


def modelspec(
    description: Description,
    *,
    resolution: str,
    prediction_type: str,
    unet_dtype: str,
    vae_dtype: str,
    thumbnail: str | None = None,
    now: datetime | None = None,
) -> dict[str, str]:
    """The metadata but for the hash, which is known once the data are written (`HASH_KEY`).

    Args:
        description: has a title.
        resolution: width x height of the square images that the model is meant for, such as "1024x1024".
        prediction_type: epsilon, v_prediction or flow.
        unet_dtype, vae_dtype: such as "float16".
        thumbnail: a data URL.
        now: default: the current time.
    """
    told = {field.name: getattr(description, field.name) for field in fields(description)}
    content = _FIXED | {name: text for name, text in told.items() if text}
    content["date"] = (now or datetime.now(timezone.utc)).isoformat(timespec="seconds")
    content["resolution"] = resolution
    content["prediction_type"] = _PREDICTION_WORDS[prediction_type]
    content |= {"unet_dtype": unet_dtype, "vae_dtype": vae_dtype}
    if thumbnail:
        content["thumbnail"] = thumbnail
    return {PREFIX + name: text for name, text in content.items()}


def thumbnail_of(image_files: Sequence[Path]) -> str:
    """A JPEG data URL of some 20 KB: the first image cut to a square, or of four images a square of squares.

    Raises:
        UserError: no image that can be read.
    """
    from PIL import Image, ImageOps

    from trainer.raster import DECODE_ERRORS, open_image

    per_side = 2 if len(image_files) >= 4 else 1
    side = THUMBNAIL_PX // per_side
    whole = Image.new("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
    for i, file in enumerate(image_files[: per_side**2]):
        try:
            with open_image(file, DEFAULT_LIMITS) as image:
                square = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
        except DECODE_ERRORS as error:
            raise UserError(f"{file}: not an image that can be read ({error})") from None
        whole.paste(square, (side * (i % per_side), side * (i // per_side)))
    data = io.BytesIO()
    whole.save(data, format="JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def told_prediction_type(metadata: Mapping[str, str]) -> str | None:
    """epsilon, v_prediction or flow, if a file's metadata say so."""
    word = metadata.get(PREFIX + "prediction_type", "").lower()
    return next((ours for ours, theirs in _PREDICTION_WORDS.items() if word in (ours, theirs)), None)


def without_folders(settings: Any) -> Any:
    """Settings as they may be published: of absolute paths, the last part."""
    if isinstance(settings, dict):
        return {name: without_folders(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [without_folders(value) for value in settings]
    return Path(settings).name if isinstance(settings, str) and settings.startswith("/") else settings

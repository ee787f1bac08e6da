"""A folder with a CLIP model in transformers' layout: what is in it, looked at before a library sees it; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, Limits
from trainer.model_files.config_bounds import ConfigFault, require_bounded
from trainer.model_files.diffusers_folder import object_or_nothing, read_config, weight_files
from trainer.model_files.tokenizer_files import require_sound

# OpenAI's, of the images that CLIP was trained on (github.com/openai/CLIP, clip.py).
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# All that the two networks are made of; other keys say how a library should load them, some of them from where.
_SHARED = (
    "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "layer_norm_eps",
)  # fmt: skip
_TEXT_KEYS = (*_SHARED, "vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
_VISION_KEYS = (*_SHARED, "num_channels", "image_size", "patch_size")
_POSITIONS = 77  # of a text


@dataclass(frozen=True)
class ClipFolder:
    """What is known of the model without its weights.

    Attributes:
        config: `text_config`, `vision_config` and `projection_dim`, of known keys alone.
        weights: safetensors files.
        image_px: side of the square images that it looks at.
        mean, std: of each channel, in images of values from 0 to 1.
    """

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]
    image_px: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


def read_clip_folder(folder: Path, limits: Limits = DEFAULT_LIMITS) -> ClipFolder:
    """Look at a model folder such as a copy of `openai/clip-vit-large-patch14`.

    Raises:
        UserError: it holds no CLIP model of a sensible size with its tokenizer and weights as safetensors.
    """
    config = read_config(folder, limits)
    if config.get("model_type") != "clip":
        raise UserError(
            f"{folder / 'config.json'}: model_type is not `clip`; wanted a whole CLIP model, text and image"
        )
    text = _checked(folder, config, "text_config", "text_encoder", _TEXT_KEYS)
    vision = _checked(folder, config, "vision_config", "clip_vision", _VISION_KEYS)
    side, projection = vision.get("image_size", 224), config.get("projection_dim", 512)
    for key, value, most in (("vision_config.image_size", side, 1024), ("projection_dim", projection, 8192)):
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(f"{folder / 'config.json'}: {key}: wanted a whole number of 1 to {most}")
    if text.get("max_position_embeddings", _POSITIONS) < _POSITIONS or vision.get("num_channels", 3) != 3:
        raise UserError(f"{folder / 'config.json'}: wanted texts of {_POSITIONS} tokens and images of three channels")
    weights = weight_files(folder, limits)
    if not weights:
        raise UserError(f"{folder}: holds no weights as safetensors, such as model.safetensors")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"{folder}: holds no tokenizer; wanted vocab.json and merges.txt")
    require_sound(folder, limits, text.get("vocab_size", 49408))
    seen = object_or_nothing(folder / "preprocessor_config.json", limits)
    mean, std = of_channels(seen.get("image_mean"), _MEAN), of_channels(seen.get("image_std"), _STD)
    plain = {"text_config": text, "vision_config": vision, "projection_dim": projection}
    return ClipFolder(folder, plain, weights, side, mean, std)


def _checked(folder: Path, config: dict[str, Any], name: str, component: str, known: tuple[str, ...]) -> dict[str, Any]:
    own = config.get(name)
    if not isinstance(own, dict):
        raise UserError(f"{folder / 'config.json'}: has no {name}; wanted a whole CLIP model, text and image")
    kept = {key: own[key] for key in known if own.get(key) is not None}
    try:
        require_bounded(component, kept)
    except ConfigFault as fault:
        raise UserError(f"{folder / 'config.json'}: {name}: {fault}") from None
    return kept


def of_channels(values: object, default: tuple[float, ...]) -> tuple[float, ...]:
    """Numbers of the three channels as a `preprocessor_config.json` has them, as far as they make sense."""
    if isinstance(values, list) and len(values) == 3 and all(type(v) is float and 0 < v < 1 for v in values):
        return tuple(values)
    return default

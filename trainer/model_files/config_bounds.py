"""Bounds of a component's configuration: whatever a `config.json` says, what is built of it has a sensible size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from trainer.guards import printable

MOST_BLOCKS = 8
MOST_TRANSFORMERS = 500  # blocks of all levels together; SDXL has 70, and each takes 4 ms to lay out
_MOST_OF_ANY = 1_000_000  # of keys that are not listed: no size of a network is beyond
_MOST_ENTRIES, _MOST_TEXT, _MOST_DEPTH = 1000, 1000, 6
_Range = tuple[int, int]
_UNET: dict[str, _Range] = {
    "block_out_channels": (1, 4096),
    "layers_per_block": (1, 16),
    "transformer_layers_per_block": (0, 32),
    "reverse_transformer_layers_per_block": (0, 32),
    "in_channels": (1, 64),
    "out_channels": (1, 64),
    "cross_attention_dim": (1, 16384),
    "attention_head_dim": (1, 1024),
    "num_attention_heads": (1, 1024),
    "addition_time_embed_dim": (1, 4096),
    "projection_class_embeddings_input_dim": (1, 65536),
    "norm_num_groups": (1, 1024),
    "time_embedding_dim": (1, 16384),
    "conv_in_kernel": (1, 9),
    "conv_out_kernel": (1, 9),
}
_VAE: dict[str, _Range] = {
    "block_out_channels": (1, 4096),
    "layers_per_block": (1, 16),
    "in_channels": (1, 64),
    "out_channels": (1, 64),
    "latent_channels": (1, 256),
    "norm_num_groups": (1, 1024),
}
_TEXT: dict[str, _Range] = {
    "vocab_size": (1, _MOST_OF_ANY),
    "hidden_size": (1, 8192),
    "intermediate_size": (1, 65536),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 512),
    "max_position_embeddings": (1, 4096),
    "projection_dim": (1, 8192),
}
_CLIP_VISION: dict[str, _Range] = {
    "hidden_size": (1, 8192),
    "intermediate_size": (1, 65536),
    "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 512),
    "projection_dim": (1, 8192),
    "num_channels": (1, 64),
    "image_size": (1, 1024),
    "patch_size": (1, 1024),
}
_RANGES = {"unet": _UNET, "vae": _VAE, "text_encoder": _TEXT, "text_encoder_2": _TEXT, "clip_vision": _CLIP_VISION}
_LISTS = ("block_out_channels", "down_block_types", "up_block_types")  # one entry for each level of the network
# What a loader would follow to code elsewhere; no component of SDXL has them.
_CODE_KEYS = ("auto_map", "attn_implementation", "_attn_implementation", "custom_pipelines", "quantization_config")


class ConfigFault(ValueError):
    """A configuration that is not a sensible one of its component; the text names key, value and rule."""


def require_bounded(component: str, config: Mapping[str, Any]) -> None:
    """Refuse a configuration of which nothing of a sensible size can be built.

    Args:
        component: one of `key_map.COMPONENTS`, or `clip_vision`, a CLIP model's part that looks at images.
    Raises:
        ConfigFault: with the first key that breaks a rule.
    """
    for key, value in config.items():
        told = printable(str(key), 60)
        if key in _CODE_KEYS and value is not None:
            raise ConfigFault(f"{told} is set, which SDXL's {component} has not and which could lead to other code")
        if key in _RANGES[component]:
            _check_counts(told, value, _RANGES[component][key])
        else:
            _check_any(told, value, 0)
    if component in ("unet", "vae"):
        _check_levels(component, config)


def _check_counts(key: str, value: object, bounds: _Range) -> None:
    """A whole number, a list of them, or nothing."""
    if value is None:
        return
    values = value if isinstance(value, list | tuple) else [value]
    least, most = bounds
    if len(values) > MOST_BLOCKS:
        raise ConfigFault(f"{key} has {len(values):,} entries; wanted at most {MOST_BLOCKS}")
    for entry in values:
        if type(entry) is list:  # SDXL's smaller relatives, which are told apart elsewhere
            if any(type(inner) is list for inner in entry):
                _deep(key)
            _check_counts(key, entry, bounds)
        elif type(entry) is not int:
            raise ConfigFault(f"{key} = {_shown(entry)}: wanted a whole number")
        elif not least <= entry <= most:
            raise ConfigFault(f"{key} = {_shown(entry)}: wanted {least} to {most:,}")


def _deep(key: str) -> NoReturn:
    raise ConfigFault(f"{key} is nested too deep")


def _check_any(key: str, value: object, depth: int) -> None:
    if depth > _MOST_DEPTH:
        _deep(key)
    if type(value) is int and abs(value) > _MOST_OF_ANY:
        raise ConfigFault(f"{key} = {_shown(value)}: wanted at most {_MOST_OF_ANY:,}")
    if isinstance(value, str) and len(value) > _MOST_TEXT:
        raise ConfigFault(f"{key} has {len(value):,} characters; wanted at most {_MOST_TEXT:,}")
    if isinstance(value, list | tuple | dict):
        if len(value) > _MOST_ENTRIES:
            raise ConfigFault(f"{key} has {len(value):,} entries; wanted at most {_MOST_ENTRIES:,}")
        for entry in value.values() if isinstance(value, dict) else value:
            _check_any(key, entry, depth + 1)


def _check_levels(component: str, config: Mapping[str, Any]) -> None:
    channels = config.get("block_out_channels")
    if not isinstance(channels, list | tuple) or not channels:
        raise ConfigFault(f"block_out_channels = {_shown(channels)}: wanted a list of whole numbers")
    for key in _LISTS[1:]:
        kinds = config.get(key, [""] * len(channels) if component == "vae" else None)
        if not isinstance(kinds, list | tuple) or not all(isinstance(kind, str) for kind in kinds):
            raise ConfigFault(f"{key} = {_shown(kinds)}: wanted a list of names")
        if len(kinds) != len(channels):
            told = f"{key} has {len(kinds)} entries, and block_out_channels {len(channels)}"
            raise ConfigFault(f"{told}; wanted as many")
    for key in ("layers_per_block", "transformer_layers_per_block", "reverse_transformer_layers_per_block"):
        values = config.get(key)
        if isinstance(values, list | tuple) and len(values) != len(channels):
            told = f"{key} has {len(values)} entries, and block_out_channels {len(channels)}"
            raise ConfigFault(f"{told}; wanted as many")
    if component == "unet":
        _check_transformers(config, len(channels))


def _check_transformers(config: Mapping[str, Any], levels: int) -> None:
    """Bounds of one key each would still allow thousands of blocks together."""
    depths, layers = config.get("transformer_layers_per_block") or 1, config.get("layers_per_block") or 2
    count = 0
    for level, kind in enumerate(config["down_block_types"]):
        if kind.startswith("CrossAttn"):
            depth = depths[level] if isinstance(depths, list | tuple) else depths
            each = layers[level] if isinstance(layers, list | tuple) else layers
            count += 2 * sum(depth) if isinstance(depth, list) else depth * (2 * each + 1)
    if count > MOST_TRANSFORMERS:
        raise ConfigFault(
            f"asks for {count:,} transformer blocks in {levels} levels; wanted at most {MOST_TRANSFORMERS}"
        )


def _shown(value: object) -> str:
    if type(value) is int and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    return printable(repr(value) if not isinstance(value, list | dict | tuple) else type(value).__name__, 60)

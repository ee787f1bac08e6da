"""SDXL's components by name, shape and dtype, wherever their weights lie; tensors are read one at a time.

`trainer.model_files.model_source` opens them; they are loaded, published and merged from here.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, Refused, parse_json, printable
from trainer.model_files.config_bounds import ConfigFault
from trainer.model_files.key_map import single_file_keys
from trainer.model_files.presets import preset

if TYPE_CHECKING:
    from torch import Tensor

TextProjection = Literal["correct", "kohya"]
CONFIGS_KEY = "sdxl_train.configs"  # metadata of a single file whose configurations are not SDXL's
PROJECTION_KEY = "sdxl_train.text_projection"  # metadata of an export: a `TextProjection`


@dataclass(frozen=True)
class ComponentTensor:
    """One tensor of a component's module.

    Attributes:
        dtype: safetensors' name of it, such as "F16", as it is stored.
        meta: a tensor of its shape and dtype, without memory.
        read: gives the tensor, on the CPU.
    """

    dtype: str
    meta: Tensor
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Component:
    """One component: its configuration, and its tensors by their names in the module."""

    name: str
    origin: Path
    config: dict[str, Any]
    tensors: Mapping[str, ComponentTensor]


def told_config(metadata: Mapping[str, str], component: str) -> dict[str, Any]:
    """A component's configuration by the metadata of a single file, or SDXL's where they have none.

    Raises:
        ValueError: what the metadata hold is no configuration of SDXL's kind.
    """
    text = metadata.get(CONFIGS_KEY, "{}").encode(errors="replace")
    try:
        own = parse_json(text, CONFIGS_KEY, most_bytes=DEFAULT_LIMITS.config_bytes)
    except Refused as refused:
        raise ValueError(refused.lines[0]) from None
    if not isinstance(own, dict):
        raise ValueError("not a JSON object")
    config = own.get(component) or preset(component)
    try:
        single_file_keys({component: config})
    except ConfigFault as fault:
        raise ValueError(f"that of the {component}: {fault}") from None
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"that of the {component} is not of SDXL's kind ({error!r})") from None
    return config


def differing_configs(parts: Mapping[str, Component]) -> dict[str, dict[str, Any]]:
    """Configurations that are not SDXL's own; a single file must carry them."""
    return {name: part.config for name, part in parts.items() if not _is_sdxl(name, part.config)}


# What says nothing about the function that the weights compute.
_NEUTRAL = ("_", "transformers_version", "dtype", "torch_dtype", "architectures", "model_type", "sample_size")
# Of diffusers' keys that SDXL's published configurations leave out: defaults that are neither null, false nor 0.
_DEFAULTS = {
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "mid_block_add_attention": True,
    "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


def _is_sdxl(component: str, config: Mapping[str, Any]) -> bool:
    known = {key: value for key, value in preset(component).items() if not key.startswith(_NEUTRAL)}
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    if any(key not in own or own[key] != value for key, value in known.items()):
        return False
    more = {key: value for key, value in own.items() if key not in known and not key.startswith(_NEUTRAL)}
    return component.startswith("text") or not any(value and value != _DEFAULTS.get(key) for key, value in more.items())


def require_whole(part: Component) -> Component:
    """The part itself.

    Raises:
        UserError: tensors are missing that its configuration asks for.
    """
    entries = single_file_keys({part.name: part.config})
    wanted = [name for entry in entries for name in entry.names]
    missing = [name for name in wanted if name not in part.tensors]
    if missing:
        count = f"{len(missing):,} of {len(wanted):,} tensors of {part.name}"
        raise UserError(f"{part.origin}: lacks {count}, such as {missing[0]}")
    return part


def name_in_module(stored_name: str, wanted: Container[str]) -> str | None:
    """The module's tensor that a stored one is for; None if there is none.

    transformers 5 dropped the prefix `text_model.` of CLIPTextModel's parameters; diffusers 0.17 renamed the VAE's
    attention. Folders have either form.
    """
    candidates = [stored_name, stored_name.removeprefix("text_model."), f"text_model.{stored_name}"]
    for old, new in _OLD_ATTENTION.items():
        if old in stored_name:
            candidates.append(stored_name.replace(old, new))
    return next((name for name in candidates if name in wanted), None)


_SCALES = ("scale_weight", "weight_scale", "weight_scale_2", "weight_scale_inv", "scale_input", "input_scale")
_SCALED_MARKS = ("scaled_fp8", "comfy_quant")


def require_unscaled(origin: Path, names: Iterable[str]) -> None:
    """Refuse weights that mean something else than they say: numbers in 8 bits, their scales in tensors beside them.

    One rule for every part of a model, however it is stored. Read without the scales, weights would be thousands of
    times too large.

    Raises:
        UserError: one of the names is that of a scale.
    """
    for name in names:
        if name.rpartition(".")[2] in (*_SCALES, *_SCALED_MARKS):
            raise UserError(
                f"{origin}: holds {printable(name)}: its weights are scaled fp8, which is not read; wanted fp32, bf16, "
                "fp16 or fp8 that is not scaled"
            )


_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

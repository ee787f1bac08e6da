"""Names of adapted layers: in the model's modules, in kohya's files, and in PEFT's; derived from the table of SDXL's
names, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from trainer.model_files.key_map import UNET_PREFIX, single_file_keys

COMPONENT_OF = {"unet": "unet", "text_encoder_1": "text_encoder", "text_encoder_2": "text_encoder_2"}
"""Parts of what trains, and the components of a model that they are."""
KOHYA_PREFIX = {"unet": "lora_unet_", "text_encoder_1": "lora_te1_", "text_encoder_2": "lora_te2_"}
_PEFT = "default"  # PEFT's name of the one adapter
# (in the model's modules, in kohya's and LyCORIS' files)
_LEAVES = (
    ("lora_A.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_up.weight"),
    ("lora_magnitude_vector.weight", "dora_scale"),
    *((name, name) for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")),
    *((name, name) for name in ("lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b")),
    ("oft_R.weight", "oft_R.weight"),
)
TO_KOHYA = dict(_LEAVES)
FROM_KOHYA = {theirs: ours for ours, theirs in _LEAVES}


class Place(NamedTuple):
    """A layer: `part` is a key of `COMPONENT_OF`, `module` its name within."""

    part: str
    module: str


def original_unet_modules(config: Mapping[str, Any]) -> dict[str, str]:
    """The UNet's modules as the original checkpoint names them, `input_blocks.4.1.proj_in`, by diffusers' names."""
    entries = single_file_keys({"unet": config})
    weights = [(e.names[0], e.file_name.removeprefix(UNET_PREFIX)) for e in entries]
    return {n.removesuffix(".weight"): o.removesuffix(".weight") for n, o in weights if n.endswith(".weight")}


def kohya_name(place: Place, original: Mapping[str, str]) -> str:
    """A layer's name in kohya's files, `lora_unet_input_blocks_4_1_proj_in`.

    Args:
        original: from `original_unet_modules`.
    """
    if place.part == "unet":
        module = original.get(place.module, place.module)
    else:
        module = f"text_model.{place.module.removeprefix('text_model.')}"
    return KOHYA_PREFIX[place.part] + module.replace(".", "_")


def stored_name(parameter: str) -> str:
    """A parameter of an adapted model, as checkpoints and PEFT's files name it: without the adapter's own name."""
    parts = parameter.split(".")
    return ".".join(part for part in parts if part != _PEFT)


def split_stored(name: str) -> tuple[Place, str]:
    """The layer of a stored tensor, and which of its tensors it is, in the modules' terms."""
    part, _, rest = name.partition(".")
    for leaf in TO_KOHYA:
        if rest.endswith(f".{leaf}"):
            return Place(part, rest.removesuffix(f".{leaf}")), leaf
    raise KeyError(name)


def base_name(parameter: str) -> str:
    """A parameter of an adapted model that is the base's own, as the base names it."""
    return ".".join(part for part in parameter.split(".") if part != "base_layer")

"""The names of all weights of a part that may train, and what is known of them from the model's configuration."""

from __future__ import annotations

from collections.abc import Iterable

from trainer.model.freeze import never_used, original_unet_names
from trainer.model.selection.model_blocks import text_encoder_blocks, unet_blocks
from trainer.model.selection.weight_rates import PartNames
from trainer.model_files.run_model import RunModel

COMPONENT_OF = {"unet": "unet", "text_encoder_1": "text_encoder", "text_encoder_2": "text_encoder_2"}
"""By part of the configuration's `trainable`, the component of the model."""


def part_names(part_name: str, names: Iterable[str], model: RunModel) -> PartNames:
    """Of a part, from the names of its weights; `text_model.` before them does not count.

    Args:
        part_name: one of `COMPONENT_OF`.
    """
    config, key = model.config(COMPONENT_OF[part_name]), f"trainable.{part_name}"
    if part_name == "unet":
        own, original = list(names), original_unet_names(config)
        return PartNames(key, own, unet_blocks(own, original), original)
    own, layers = [without_prefix(name) for name in names], config["num_hidden_layers"]
    if part_name == "text_encoder_2":
        return PartNames(key, own, text_encoder_blocks(own, layers))
    return PartNames(key, own, text_encoder_blocks(own, layers - 1), unused=never_used(own, layers))


def without_prefix(name: str) -> str:
    """A text encoder's weight as transformers 5 calls it."""
    return name.removeprefix("text_model.")

"""Choices of what of the UNet trains that have a name: `trainable.unet.preset`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.config.sections.trainable_config import UnetPreset
from trainer.model.freeze import frozen_names
from trainer.model.selection.model_blocks import Blocks

_FROZEN_71 = (
    *(f"input_blocks.{number}" for number in (1, 2, 3, 6)),
    "input_blocks.8.1",
    "output_blocks.0.1",
    "output_blocks.2.2",
    "output_blocks.5.2",
    *(f"output_blocks.{number}" for number in (6, 7, 8)),
)
_FROZEN_68 = (*_FROZEN_71, "middle_block.0", "middle_block.2")
_FROZEN_63 = (
    *_FROZEN_68,
    *(f"input_blocks.{number}.0" for number in (4, 5, 8)),
    *(f"output_blocks.{number}.0" for number in (0, 3, 4, 5)),
)
_FROZEN = {"unet_71": _FROZEN_71, "unet_68": _FROZEN_68, "unet_63": _FROZEN_63}
_ONLY = {"attention": ("attn1", "attn2"), "cross_attention": ("attn2",)}
_DEEPEST = {"deepest_half": 1 / 2, "deepest_quarter": 1 / 4}


def preset_names(
    preset: UnetPreset, names: Sequence[str], original_names: Mapping[str, str], blocks: Blocks
) -> tuple[set[str], list[str]]:
    """The weights that train, and those of the preset's patterns that this UNet has nothing for.

    Args:
        names: of all weights; `original_names`: in the original checkpoint's terms; `blocks`: of these.
    """
    if preset in _FROZEN:
        frozen, idle = frozen_names(names, _FROZEN[preset], original_names)
        return {*names} - frozen, idle
    if preset in _ONLY:
        return frozen_names(names, _ONLY[preset], original_names)
    if preset == "all":
        return {*names}, []
    levels = max(blocks.depth.values()) + 1
    share = _DEEPEST.get(preset, 1 / 2)
    deep = {name for name in names if blocks.depth[blocks.of[name]] >= levels * (1 - share)}
    return ({*names} - deep if preset == "outer_half" else deep), []

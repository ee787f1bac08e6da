"""Which parameters a pattern means, and which SDXL never uses."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import translate
from typing import Any

from trainer.model_files.key_map import UNET_PREFIX, single_file_keys


def frozen_names(
    names: Iterable[str], patterns: Sequence[str], other_names: Mapping[str, str] | None = None
) -> tuple[set[str], list[str]]:
    """The parameters that patterns mean, and the patterns that mean none.

    Args:
        names: of all parameters.
        patterns: whole names, or words of them between dots, at the beginning or within; `*` stands for anything, dots
            as well.
        other_names: second names of some parameters, which patterns may mean as well.
    """
    matchers = [(pattern, _matcher(pattern)) for pattern in patterns]
    frozen, idle = set(), set(patterns)
    for name in names:
        also = (other_names or {}).get(name, name)
        meant = [pattern for pattern, matches in matchers if matches(name) or matches(also)]
        idle -= set(meant)
        if meant:
            frozen.add(name)
    return frozen, [pattern for pattern in patterns if pattern in idle]


def original_unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The UNet's parameters in the original checkpoint's terms, such as `input_blocks.4.1.norm.weight`."""
    return {entry.names[0]: entry.file_name.removeprefix(UNET_PREFIX) for entry in single_file_keys({"unet": config})}


def never_used(names: Iterable[str], num_layers: int) -> set[str]:
    """Parameters of the first text encoder that no output of SDXL depends on: its last layer and final norm.

    SDXL takes what comes out of the layer before the last. Their gradients would not exist, and DDP would wait.
    """
    unused = (f"encoder.layers.{num_layers - 1}.", "final_layer_norm.")
    return {name for name in names if name.removeprefix("text_model.").startswith(unused)}


def meant_by(
    names: Iterable[str], patterns: Iterable[str], other_names: Mapping[str, str] | None = None
) -> dict[str, set[str]]:
    """By pattern, the parameters that it means; as `frozen_names`."""
    names = list(names)
    return {pattern: frozen_names(names, [pattern], other_names)[0] for pattern in patterns}


def _matcher(pattern: str) -> Callable[[str], bool]:
    words = pattern.strip(".")
    forms = (pattern, f"{words}.*", f"*.{words}", f"*.{words}.*")
    matches = re.compile("|".join(translate(form) for form in forms)).match
    return lambda name: bool(matches(name))

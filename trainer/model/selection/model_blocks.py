"""The blocks that a part of the model is made of, by the names of its weights, and how far they are from its output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Blocks:
    """The blocks of a part.

    Attributes:
        of: the block of each weight by the weight's name, such as `input_blocks.4` or `encoder.layers.3`.
        from_output: by block, how many blocks it is away from what the part gives out, which is itself 0.
        depth: by block, how many lie above it on its side of the UNet; empty for text encoders.
    """

    of: Mapping[str, str]
    from_output: Mapping[str, int]
    depth: Mapping[str, int]


def unet_blocks(names: Iterable[str], original_names: Mapping[str, str]) -> Blocks:
    """Those of the UNet, in the original checkpoint's terms, whose blocks stand in a row.

    Args:
        names: of all weights, as diffusers has them.
        original_names: the same in the original's terms.
    """
    of = {name: _original_block(original_names.get(name, name)) for name in names}
    down, up = (_count(of.values(), side) for side in ("input_blocks", "output_blocks"))
    from_output, depth = dict[str, int](), dict[str, int]()
    for block in dict.fromkeys(of.values()):
        side, _, number = block.partition(".")
        if side == "output_blocks":
            from_output[block], depth[block] = up - int(number), up - 1 - int(number)
        elif side == "middle_block":
            from_output[block], depth[block] = up + 1, down
        elif side == "input_blocks":
            from_output[block], depth[block] = up + 1 + down - int(number), int(number)
        else:
            from_output[block], depth[block] = 0 if side == "out" else up + down + 2, 0
    return Blocks(of, from_output, depth)


def text_encoder_blocks(names: Iterable[str], layers_used: int) -> Blocks:
    """Those of a text encoder.

    Args:
        names: of all weights, without `text_model.` before them.
        layers_used: how many of its layers count for what SDXL takes from it.
    """
    of = {name: _layer_or_module(name) for name in names}
    from_output = {}
    for block in dict.fromkeys(of.values()):
        number = block.rpartition(".")[2]
        last = 0 if block != "embeddings" else layers_used + 1
        from_output[block] = max(layers_used - int(number), 0) if number.isdecimal() else last
    return Blocks(of, from_output, {})


def _original_block(name: str) -> str:
    words = name.split(".")
    return ".".join(words[:2]) if words[0] in ("input_blocks", "output_blocks") else words[0]


def _layer_or_module(name: str) -> str:
    words = name.split(".")
    return ".".join(words[:3]) if words[:2] == ["encoder", "layers"] else words[0]


def _count(blocks: Iterable[str], side: str) -> int:
    return len({block for block in blocks if block.startswith(f"{side}.")})

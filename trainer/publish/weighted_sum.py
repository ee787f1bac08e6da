"""The weighted sum of two models of the same shape, tensor by tensor, with weights for blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from trainer.errors import UserError
from trainer.model.freeze import frozen_names
from trainer.model_files.components import Component, ComponentTensor
from trainer.model_files.key_map import UNET_PREFIX, KeyEntry, block_of, single_file_keys

if TYPE_CHECKING:
    from torch import Tensor

BlockWeights = Sequence[tuple[str, float]]
"""(pattern, share of the second model); of patterns that mean the same tensor, the last one counts."""


def merged_parts(
    first: Mapping[str, Component], second: Mapping[str, Component], alpha: float, blocks: BlockWeights = ()
) -> dict[str, Component]:
    """Parts whose tensors are first * (1 - share) + second * share, computed in fp32 when they are read.

    The VAE is the first model's unless a pattern names it: the mean of two VAEs is none.

    Args:
        alpha: the second model's share where no pattern says otherwise.
        blocks: patterns as `freeze` takes them: a block (`input_blocks.4`, `middle_block`, `text_encoder_1.layers.3`),
            a whole part (`unet`, `text_encoder_2`, `vae`) or a tensor's name; `*` stands for anything.

    Raises:
        UserError: the models differ in shape, or a pattern means nothing.
    """
    entries = single_file_keys({name: part.config for name, part in first.items()})
    shares = _shares(entries, alpha, blocks)
    merged = {}
    for name, part in first.items():
        tensors = {}
        for entry in entries:
            if entry.component == name:
                for own in entry.names:
                    tensors[own] = _merged(part, second[name], own, shares[entry.file_name])
        merged[name] = Component(name, part.origin, part.config, tensors)
    return merged


def _shares(entries: Sequence[KeyEntry], alpha: float, blocks: BlockWeights) -> dict[str, float]:
    """The second model's share of each tensor, by its name in a single file."""
    shares = {entry.file_name: 0.0 if entry.component == "vae" else alpha for entry in entries}
    by_name = {entry.file_name.removeprefix(UNET_PREFIX): entry for entry in entries}
    also = {name: _full_block(entry) for name, entry in by_name.items()}
    for pattern, share in blocks:
        meant, idle = frozen_names(by_name, [pattern], also)
        if idle:
            raise UserError(
                f"--block {pattern}={share:g}: means no tensor; blocks are named like input_blocks.4, middle_block, "
                "output_blocks.0.1, unet, text_encoder_1, text_encoder_2.layers.30, vae"
            )
        shares |= {by_name[name].file_name: share for name in meant}
    return shares


def _full_block(entry: KeyEntry) -> str:
    block = block_of(entry.file_name)
    return f"unet.{block}" if entry.component == "unet" else block


def _merged(first: Component, second: Component, name: str, share: float) -> ComponentTensor:
    import torch

    a, b = first.tensors[name], second.tensors.get(name)
    if b is None or b.meta.shape != a.meta.shape:
        found = f"has shape {list(b.meta.shape)}" if b else "is missing"
        raise UserError(
            f"{second.origin}: {first.name}'s {name} {found}, and {first.origin} has {list(a.meta.shape)}: "
            "only models of the same shape can be merged"
        )
    meta = torch.empty(a.meta.shape, dtype=torch.float32, device="meta")
    return ComponentTensor("F32", meta, partial(_weighted, a.read, b.read, share))


def _weighted(first: Callable[[], Tensor], second: Callable[[], Tensor], share: float) -> Tensor:
    if share in (0.0, 1.0):
        return (second if share else first)().float()
    # Where both are equal this gives the same value, which a * (1 - share) + b * share would not.
    return first().float().lerp(second().float(), share)

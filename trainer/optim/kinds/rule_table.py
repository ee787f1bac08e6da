"""The rules by the names of their kinds, and the size of the state that each keeps."""

from collections.abc import Mapping
from math import prod

import torch

from trainer.optim.eight_bit import blocks_per_row, takes_8_bits
from trainer.optim.kinds.distance_rules import DAdaptAdam, Prodigy
from trainer.optim.kinds.elementwise_rules import Adopt, Lion, Lion8Bit, ScheduleFreeAdamW
from trainer.optim.kinds.muon_rule import Muon
from trainer.optim.kinds.rule import Rule
from trainer.optim.kinds.tensor_rules import Adafactor, Came, StableAdamW

RULES: Mapping[str, Rule] = {
    rule.kind: rule
    for rule in (
        Lion(),
        Lion8Bit(),
        Adafactor(),
        Came(),
        Prodigy(),
        DAdaptAdam(),
        ScheduleFreeAdamW(),
        StableAdamW(),
        Adopt(),
        Muon(),
    )
}
"""All kinds but AdamW, whose moments in two precisions are `trainer.optim.adamw`'s."""


def keeps_8_bits(kind: str, shape: tuple[int, ...]) -> bool:
    """Whether what a kind keeps of a parameter of this (whole) shape is in blocks of 8 bits."""
    return kind in ("adamw_8bit", "lion_8bit") and takes_8_bits(shape)


def state_bytes(kind: str, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of a parameter's state: what is spread with its rows, and what every worker has.

    Args:
        dtype: of the weights.
    """
    if kind not in RULES:
        return (2 * _in_8_bits(shape) if keeps_8_bits(kind, shape) else 8 * prod(shape)), 0
    spread, everywhere = 0, 0
    for tensor in RULES[kind].tensors(name, shape, dtype).values():
        num_bytes = prod(tensor.shape) * tensor.dtype.itemsize
        if not tensor.by_rows:
            everywhere += num_bytes
        else:
            spread += _in_8_bits(shape) if keeps_8_bits(kind, shape) else num_bytes
    return spread, everywhere


def _in_8_bits(shape: tuple[int, ...]) -> int:
    """Codes and scales."""
    return prod(shape) + 4 * shape[0] * blocks_per_row(shape)

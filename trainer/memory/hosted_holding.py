"""What a worker holds whose optimizer's state, or whose blocks' weights, lie in the host's memory (`optim/hosted/`)."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from trainer.memory.holdings import Holding, ParameterSize

SLOTS = 2
"""Blocks that are on the card: one that computes or is updated, and one that comes or goes."""


def with_state_in_host(holding: Holding, state: Mapping[str, int]) -> Holding:
    """The same with two slots for the largest block's state in place of all of it.

    Args:
        state: bytes for each weight that trains, by its name.
    """
    blocks = Counter[str]()
    for name, num_bytes in state.items():
        blocks[holding.released_with[name]] += num_bytes
    slots = SLOTS * max(blocks.values(), default=0)
    return replace(holding, optimizer_bytes=0.0, optimizer_everywhere_bytes=slots, hosted_bytes=blocks.total())


def with_weights_in_host(
    holding: Holding, parameters: Sequence[ParameterSize], unit_of: Mapping[str, str], hosted: Collection[str]
) -> Holding:
    """The same with two slots for the largest block's weights in place of all blocks'.

    Args:
        unit_of: the block of a parameter, by name.
        hosted: names of the blocks whose weights lie in the host's memory.
    """
    blocks = Counter[str]()
    for parameter in parameters:
        if (block := unit_of.get(parameter.name, "")) in hosted:
            blocks[block] += parameter.numel * holding.held_width(trains=parameter.trains)
    slots = SLOTS * max(blocks.values(), default=0)
    return replace(holding, hosted_weight_bytes=blocks.total(), weight_slot_bytes=slots)

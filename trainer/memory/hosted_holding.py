"""What a worker holds whose optimizer keeps its state in the host's memory (`trainer.optim.hosted.hosted_state`)."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from trainer.memory.holdings import Holding

SLOTS = 2
"""Blocks whose state is on the card: one that is updated, and one that comes or goes."""


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

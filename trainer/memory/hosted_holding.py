"""What a worker holds whose optimizer keeps its state in the host's memory (`trainer.optim.hosted.hosted_state`)."""

from collections import Counter
from dataclasses import replace

from trainer.memory.holdings import Holding
from trainer.memory.planned_run import PlannedRun
from trainer.memory.trace import Trace
from trainer.memory.traced_run import parameter_state

SLOTS = 2
"""Blocks whose state is on the card: one that is updated, and one that comes or goes."""


def with_state_in_host(run: PlannedRun, trace: Trace, holding: Holding) -> Holding:
    """The same with two slots for the largest block's state in place of all of it."""
    blocks = Counter[str]()
    for name in trace.trains:
        blocks[holding.released_with[name]] += parameter_state(run, trace, name).total
    slots = SLOTS * max(blocks.values(), default=0)
    return replace(holding, optimizer_bytes=0.0, optimizer_everywhere_bytes=slots, hosted_bytes=blocks.total())

"""What a step takes beside weights, gradients and state, as PyTorch counts it, against what the plan says."""

from typing import Any

import pytest
import torch

from tests.optim.test_kind_states import made
from tests.optim.test_kinds import gradients
from trainer.optim.kinds.rule_table import RULES

SHAPES = {"block.large": (1024, 2048), "block.small": (64, 64), "block.bias": (300,)}


def highest(optimizer: Any) -> int:
    """Bytes that a step holds at once, above what was held before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        mark = torch.zeros(1)
        optimizer.step()
    results: Any = profiler.profiler
    events, found = list(results.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events += event.children
        if event.name == "[memory]":
            found.append((event.start_time_ns, event.extra_fields.total_allocated))
    del mark
    return max(total for _, total in found) - min(found)[1]


@pytest.mark.parametrize("rounding", [None, "stochastic", "kahan"])
@pytest.mark.parametrize("kind", RULES)
def test_a_step_takes_what_the_plan_says(kind: str, rounding: str | None) -> None:
    named, optimizer = made(kind, rounding, SHAPES)
    for step in range(2):
        gradients(step, named)
        optimizer.step()
    optimizer.chunk_elements = large = 1024 * 2048
    measured, rule = highest(optimizer), RULES[kind]
    planned = (rule.scratch_bytes + rule.whole_bytes + (4 if rounding and not rule.in_chunks else 0)) * large
    assert 0.4 * planned < measured < 1.05 * planned, (measured / large, planned / large)

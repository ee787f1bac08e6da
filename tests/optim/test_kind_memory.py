"""What a step takes beside weights, gradients and state, as PyTorch counts it, against what the plan says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.optim.test_kind_states import made, numbers
from tests.optim.test_kinds import gradients, ours
from tests.train.real_run import model_of, run_config
from trainer.data.buckets import Bucket
from trainer.memory.planned_run import PlannedRun
from trainer.memory.strategy_peak import strategy_peak
from trainer.memory.trace import Trace
from trainer.memory.traced_run import Shape, TracedRun, holdings
from trainer.optim.kinds.rule_table import RULES
from trainer.train.memory_inputs import planned_run

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


@pytest.fixture(scope="module")
def traced(model_folder: Path) -> tuple[PlannedRun, Trace]:
    """A pass of the tiny model."""
    config = run_config(model_folder, Path("prepared"), Path("run"), steps=1)
    run = planned_run(config, model_of(config))
    return run, TracedRun(run, Shape(Bucket(64, 64), 1), "cpu").trace("single")


@pytest.mark.e2e
@pytest.mark.parametrize("kind", RULES)
def test_the_plan_of_a_model_counts_the_state_that_it_has(traced: tuple[PlannedRun, Trace], kind: Any) -> None:
    """One worker's to the byte; of four with zero2 the rows of one, and all moments of columns."""
    run, trace = replace(traced[0], optimizer=kind), traced[1]
    named = {name: nn.Parameter(torch.zeros(trace.shapes[name])) for name in trace.trains}
    optimizer = ours(named, kind, **numbers(kind))
    whole = sum(
        value.nbytes
        for name, parameter in named.items()
        for value in optimizer.start(parameter, optimizer.param_groups[0], name).values()
        if value.ndim
    )
    alone = strategy_peak(trace, holdings(run, trace, 1, 1, "cpu")["one worker"])
    assert alone.split["optimizer"] == pytest.approx(whole, abs=8)
    states = [optimizer.state[parameter].items() for parameter in named.values()]
    columns = sum(value.nbytes for state in states for key, value in state if key.endswith("_col"))
    spread = strategy_peak(trace, holdings(run, trace, 4, 1, "cpu")["zero2"])
    assert spread.split["optimizer"] == pytest.approx((whole - columns) / 4 + columns, rel=0.05)

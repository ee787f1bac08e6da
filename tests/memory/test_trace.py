"""Planned against measured peaks: the same small models, without memory and trained for real."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.memory_plan import Case, measure, plan
from trainer.memory.trace import trace_pass, trace_peak
from trainer.optim.hosted import hosted_activations
from trainer.parallel.comm import keep_group_alive
from trainer.parallel.strategy import StrategyKind

MIB = 2**20
SLOW = pytest.mark.slow


@pytest.fixture
def alone() -> Iterator[None]:
    """Worker 0 of four, whose messages go nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.e2e
@pytest.mark.parametrize(("accumulation", "recompute"), [(1, False), pytest.param(2, True, marks=SLOW)])
def test_one_worker(accumulation: int, recompute: bool) -> None:
    """Also after another measurement, whose memory was freed when nobody counted."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True):
        left = torch.zeros(5_000_000)
    del left
    case = Case("mini", "single", 1, accumulation, recompute, side_px=128)
    assert plan(case).total == pytest.approx(measure(case, 0), rel=0.02)


@pytest.mark.e2e
@pytest.mark.parametrize("recompute", [True, pytest.param(False, marks=SLOW)])
def test_gradients_that_are_released(recompute: bool) -> None:
    """Nearly all of their memory is saved where activations do not hide it."""
    case = Case("mini", "single", 1, 1, recompute, side_px=64, batch=1, release=True)
    planned, kept = plan(case), plan(replace(case, release=False))
    assert planned.total == pytest.approx(measure(case, 0), rel=0.05)
    assert kept.total - planned.total > 0.75 * kept.split["gradients"]


@pytest.mark.e2e
@pytest.mark.parametrize("recompute", [True, pytest.param(False, marks=SLOW)])
def test_state_in_the_host(recompute: bool) -> None:
    """What it takes beside the weights is two blocks' worth."""
    case = Case("mini", "single", 1, 1, recompute, side_px=64, batch=1, release=True, hosts_state=True)
    planned, kept = plan(case), plan(replace(case, hosts_state=False))
    assert planned.total == pytest.approx(measure(case, 0), rel=0.05)
    assert planned.split["optimizer"] < 0.35 * kept.split["optimizer"]


@pytest.mark.e2e
def test_weights_in_the_host() -> None:
    """Of the blocks, two slots' worth stays."""
    hosted: dict[str, Any] = {"release": True, "hosts_state": True}
    case = Case("mini", "single", 1, 1, True, side_px=64, batch=1, **hosted, hosts_weights=True)
    planned, kept = plan(case), plan(replace(case, hosts_weights=False))
    assert planned.total == pytest.approx(measure(case, 0), rel=0.05)
    assert planned.split["weights"] < 0.6 * kept.split["weights"]


@pytest.mark.e2e
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("accumulation", "recompute", "each_pass"),
    [(1, True, False), pytest.param(1, False, False, marks=SLOW), pytest.param(2, True, True, marks=SLOW)],
)
def test_zero2(accumulation: int, recompute: bool, each_pass: bool) -> None:
    """fp32 shares, bf16 in the passes."""
    case = Case("mini", "zero2", 4, accumulation, recompute, each_pass, compute="bf16", side_px=128)
    assert plan(case).total == pytest.approx(measure(case, 0), rel=0.05)


@pytest.mark.e2e
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("kind", "accumulation", "each_pass", "compute"),
    [
        ("zero2", 1, False, "bf16"),
        ("zero3", 1, False, "fp32"),
        ("zero2", 2, True, "bf16"),
        pytest.param("zero2", 1, False, "fp32", marks=SLOW),
        pytest.param("zero2", 2, False, "bf16", marks=SLOW),
        pytest.param("zero3", 2, True, "bf16", marks=SLOW),
    ],
)
def test_groups_of_workers(kind: StrategyKind, accumulation: int, each_pass: bool, compute: str) -> None:
    """Four workers in two groups; shares are of half the model."""
    shape: dict[str, Any] = {"compute": compute, "side_px": 64, "batch": 1, "within": 2}
    case = Case("mini", kind, 4, accumulation, True, each_pass, **shape)
    planned = plan(case)
    assert planned.total == pytest.approx(measure(case, 0), rel=0.02)
    assert planned.total > 1.3 * plan(replace(case, within=None)).total


@pytest.mark.e2e
def test_ddp_with_accumulation_holds_gradients_once() -> None:
    """As one of one worker, whose wrapper holds what those of four hold."""
    case = Case("mini", "ddp", 4, 2, True, side_px=128)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    keep_group_alive()
    try:
        assert plan(case).total == pytest.approx(measure(case, 0), rel=0.02)
    finally:
        dist.destroy_process_group()


@pytest.mark.e2e
@pytest.mark.usefixtures("alone")
def test_zero3() -> None:
    case = Case("mini", "zero3", 4, 1, True, compute="bf16", side_px=128)
    assert plan(case).total == pytest.approx(measure(case, 0), rel=0.05)


@pytest.mark.e2e
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("kind", "recompute", "compute"),
    [("zero3", True, "fp32"), ("zero2", False, "fp32"), ("zero3", False, "bf16"), ("zero3", True, "bf16")],
)
def test_an_adapter_beside_a_base_that_is_spread(kind: StrategyKind, recompute: bool, compute: str) -> None:
    case = Case("mini", kind, 4, 1, recompute, compute=compute, side_px=128, adapter="lora")
    planned, replicated = plan(case), plan(replace(case, kind="ddp"))
    assert planned.total == pytest.approx(measure(case, 0), rel=0.05)
    if kind == "zero3" and recompute:
        assert planned.total < 0.75 * replicated.total


@pytest.mark.e2e
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("kind", "moves", "recompute", "accumulation", "compute"),
    [
        ("single", 6, False, 1, "fp32"),
        ("single", 6, True, 2, "fp32"),
        ("zero2", 9, False, 1, "bf16"),
        ("zero3", 4, True, 1, "bf16"),
        pytest.param("single", 9, False, 1, "bf16", marks=SLOW),
        pytest.param("zero2", 4, True, 2, "fp32", marks=SLOW),
    ],
)
def test_activations_that_wait_in_the_host(
    kind: StrategyKind, moves: int, recompute: bool, accumulation: int, compute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some of the blocks', with what is on its way; the others' kept, or recomputed."""
    monkeypatch.setattr(hosted_activations, "SMALLEST_BYTES", 2**14)
    shape: dict[str, Any] = {"compute": compute, "side_px": 128, "batch": 4}
    case = Case("mini", kind, 1 if kind == "single" else 4, accumulation, recompute, moves=moves, **shape)
    planned, kept = plan(case), plan(replace(case, recompute=False, moves=0))
    assert planned.total == pytest.approx(measure(case, 0), rel=0.02)
    assert planned.split["activations"] < (0.7 if recompute else 0.95) * kept.split["activations"]


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("kind", ["zero2", "single"])
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("recompute", [False, True])
def test_mid_size(kind: str, accumulation: int, recompute: bool) -> None:
    """About 170M weights."""
    case = Case("m100", kind, 4 if kind == "zero2" else 1, accumulation, recompute, accumulation > 1)  # pyright: ignore[reportArgumentType]
    assert plan(case).total == pytest.approx(measure(case, 0), rel=0.05)


def test_what_a_pass_keeps() -> None:
    """Counted by hand: each layer keeps its input, a gradient replaces it on the way back."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(3)))
    activation = 1024 * 256 * 4

    def loss() -> torch.Tensor:
        return model(torch.empty(1024, 256, device="meta")).sum()

    trace = trace_pass(model, loss, dict(model.named_children()), "cpu")
    assert trace.saved_bytes == pytest.approx(3 * activation, abs=64)  # of the last layer, the sum needs no output
    assert trace.forward_flops == 3 * 2 * 1024 * 256 * 256
    assert trace.flops == trace.forward_flops + (3 + 2) * 2 * 1024 * 256 * 256  # no gradient of the model's input
    gradients = [segment for segment in trace.segments if segment.mark == "gradient"]
    assert [segment.name for segment in gradients] == ["2.weight", "1.weight", "0.weight"]
    assert {segment.gradient_bytes for segment in gradients} == {256 * 256 * 4}
    assert sum(segment.net for segment in trace.segments) == 0
    assert trace.unit_of == {"0.weight": "0", "1.weight": "1", "2.weight": "2"}


def test_a_pass_without_gradients() -> None:
    weight = torch.empty(256, 256, device="meta")

    def run() -> torch.Tensor:
        return torch.empty(1024, 256, device="meta") @ weight

    assert trace_peak(run, [weight], "cuda") == 2 * MIB

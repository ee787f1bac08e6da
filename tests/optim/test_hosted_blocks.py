"""Blocks whose state comes and goes: against an optimizer that keeps all of it, with copies that take their time."""

import time
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import nn

from trainer.config.schema import OptimizerConfig
from trainer.config.sections.optimizer_config import KINDS
from trainer.optim.adamw import Rounding
from trainer.optim.hosted.hosted_state import ALIGNMENT, HostedState
from trainer.optim.optimizers import load_optimizer_tensors, make_optimizer, optimizer_tensors

BLOCKS = ("first", "second", "third")
CPU = torch.device("cpu")


def parameters(dtype: torch.dtype, device: torch.device) -> dict[str, nn.Parameter]:
    """Two weights of each block, of sizes that differ."""
    draw = torch.Generator().manual_seed(1)
    shapes = {"first": ((64, 128), (7,)), "second": ((96, 64, 3, 3), (96,)), "third": ((40, 320), (3,))}
    return {
        f"{block}.{number}": nn.Parameter(torch.randn(shape, generator=draw).to(device, dtype))
        for block, both in shapes.items()
        for number, shape in enumerate(both)
    }


def members(named: dict[str, nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    return {block: [named[f"{block}.{number}"] for number in range(2)] for block in BLOCKS}


def slow_down(hosted: HostedState) -> None:
    """The next copies wait, or on a card the next update."""
    if hosted._device.type == "cuda":
        torch.cuda._sleep(20_000_000)
        return
    for lane in (hosted._fetching, hosted._sending):
        assert lane.thread is not None
        lane.thread.submit(time.sleep, 0.004)


class Trained:
    """Weights that are updated block by block; with state at home in the host's memory, or without."""

    def __init__(self, kind: str, rounding: Rounding | None, hosted: bool, device: torch.device = CPU) -> None:
        self.named = parameters(torch.bfloat16 if rounding else torch.float32, device)
        config = OptimizerConfig.model_validate({"kind": kind, "lr": 1e-2})
        self.optimizer = make_optimizer(self.named, config, rounding=rounding, seed=3, free_gradients=True)
        self.hosted = HostedState(self.optimizer, members(self.named), device) if hosted else None

    def step(self, number: int, order: Sequence[str], lacks: str = "") -> None:
        """Update blocks in an order, all but one weight."""
        if self.hosted:
            slow_down(self.hosted)
            self.hosted.begin()
        for block in order:
            for place in range(2):
                name = f"{block}.{place}"
                draw = torch.Generator().manual_seed(100 * number + len(name) + ord(name[-1]) + ord(name[0]))
                weight = self.named[name]
                weight.grad = torch.randn(weight.shape, generator=draw).to(weight) if name != lacks else None
            if self.hosted is None:
                self.optimizer.step()
            else:
                with self.hosted.on_device(block):
                    self.optimizer.step()
                slow_down(self.hosted)
            for weight in self.named.values():
                weight.grad = None
        if self.hosted:
            self.hosted.settle()


def require_same(one: Trained, other: Trained) -> None:
    for name, weight in one.named.items():
        assert torch.equal(weight, other.named[name]), name
    states = [optimizer_tensors(each.optimizer, each.named) for each in (one, other)]
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value.cpu(), states[1][name].cpu())] == []


KIND_NAMES = [kind for kind in KINDS if kind not in ("prodigy", "dadapt_adam")]  # they are refused
WAYS: list[tuple[str, Rounding | None]] = [
    ("adamw", None),
    ("adamw", "kahan"),
    ("schedule_free_adamw", "kahan"),
    *((kind, "stochastic") for kind in KIND_NAMES),
]


@pytest.fixture(params=WAYS, ids=lambda way: "-".join(map(str, way)))
def pair(request: pytest.FixtureRequest) -> Callable[[], tuple[Trained, Trained]]:
    return lambda: (Trained(*request.param, hosted=False), Trained(*request.param, hosted=True))


def test_any_order_and_blocks_that_are_left_out(pair: Callable[[], tuple[Trained, Trained]]) -> None:
    usual, ours = pair()
    orders = [BLOCKS, BLOCKS, BLOCKS[::-1], BLOCKS[:1], BLOCKS, ("first", "third"), ("third",), ("second", "first")]
    for number, order in enumerate([*orders, BLOCKS, BLOCKS]):
        for each in (usual, ours):
            each.step(number, order)
        require_same(usual, ours)
    assert ours.hosted is not None
    largest = max(len(home.host.memory) for home in ours.hosted._homes.values())
    assert ours.hosted.device_bytes == 2 * largest
    assert all(first % ALIGNMENT == 0 for home in ours.hosted._homes.values() for _, _, first, *_ in home.places)


def test_a_weight_that_gets_its_first_gradient_later(pair: Callable[[], tuple[Trained, Trained]]) -> None:
    usual, ours = pair()
    for number, lacks in enumerate(["second.0", "second.0", "", "third.0", ""]):
        for each in (usual, ours):
            each.step(number, BLOCKS, lacks)
        require_same(usual, ours)


def test_state_that_is_dropped_or_taken_over(pair: Callable[[], tuple[Trained, Trained]]) -> None:
    """As after a dry run; and from a checkpoint, into the memory that the dry run made."""
    usual, ours = pair()
    for number in range(3):
        for each in (usual, ours):
            each.step(number, BLOCKS)
    assert ours.hosted is not None
    tensors = {name: value.clone() for name, value in optimizer_tensors(usual.optimizer, usual.named).items()}
    homes = {block: home.host.memory.data_ptr() for block, home in ours.hosted._homes.items()}
    for each in (usual, ours):
        each.optimizer.state.clear()
    ours.hosted.clear()
    for each in (usual, ours):
        each.step(3, BLOCKS)
    require_same(usual, ours)
    for each in (usual, ours):
        each.optimizer.state.clear()
    ours.hosted.clear()
    load_optimizer_tensors(usual.optimizer, usual.named, ((name, value.clone()) for name, value in tensors.items()))
    load_optimizer_tensors(ours.optimizer, ours.named, tensors.items(), CPU)
    ours.hosted.adopt()
    assert homes == {block: home.host.memory.data_ptr() for block, home in ours.hosted._homes.items()}
    for number in range(4, 6):
        for each in (usual, ours):
            each.step(number, BLOCKS)
    require_same(usual, ours)

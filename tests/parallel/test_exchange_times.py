"""Waiting for others is told apart from computing, however the model is shared: real workers, one of which is late."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch

from tests.worker_group import run_group
from trainer.parallel import exchange_times
from trainer.parallel.exchange_times import mark_when_computed, time_waits

SCRIPT = Path(__file__).parent / "exchange_script.py"
LATE_S, STEPS = 2.0, 3


@pytest.mark.e2e
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_who_waits_is_told_so_and_who_is_late_is_not(tmp_path: Path, kind: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "SDXL_TRAIN_DEVICE": "cpu"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(SCRIPT), str(tmp_path), kind, "1", str(LATE_S), str(STEPS)]
    run_group([command] * 2, [env | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"], tmp_path)
    told = [json.loads((tmp_path / f"{kind}-{rank}.json").read_text()) for rank in range(2)]
    assert all(each["is_known"] for each in told)
    # DDP's workers also meet in their first forward pass, to agree on the order of its buckets.
    for waits, late in zip(*(each["steps"][1:] for each in told), strict=True):
        # Half of it: on a busy machine, the one that waits may come later than it could.
        assert waits["exchange"] > LATE_S / 2 and late["forward"] > LATE_S
        assert waits["forward"] + waits["backward"] < late["forward"] + late["backward"] - LATE_S / 2
        assert late["exchange"] < waits["exchange"]
    if kind == "ddp":  # when the backward pass is over, no more than the first layer's gradients are left
        layer = (64 * 64 + 64) * 4
        assert told[0]["buckets"] == ", ".join([str(layer)] * 4)


class Timeline:
    """Notes the marks that it is given."""

    def __init__(self, current: str | None) -> None:
        self.current = current
        self.marks: list[str | None] = []

    def mark(self, phase: str | None) -> None:
        self.current = phase
        self.marks.append(phase)


@pytest.mark.parametrize("current", ["backward", None])
def test_the_exchange_begins_behind_the_last_gradient_and_before_what_asks_later(current: str | None) -> None:
    """As DDP's last callback does, which waits for the buckets; in a pause nothing is marked."""
    order: list[str] = []
    timeline = Timeline(current)
    timeline.mark = lambda phase: order.append(f"mark {phase}")  # type: ignore[method-assign]
    weight = torch.ones(3, requires_grad=True)

    def last(gradient: torch.Tensor) -> None:
        order.append("gradient")
        torch.autograd.Variable._execution_engine.queue_callback(lambda: order.append("wait"))  # type: ignore

    weight.register_hook(last)
    loss = (weight * 2).sum() * 1.0
    mark_when_computed(loss, timeline)
    loss.backward()
    assert order == ["gradient", *(["mark exchange"] if current else []), "wait"]


def test_names_that_this_pytorch_does_not_have_are_no_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    class Group:
        """Of some other PyTorch."""

        def wait_for_all(self) -> None: ...

    monkeypatch.setattr(exchange_times, "FSDPModule", torch.nn.Linear)
    monkeypatch.setattr(exchange_times, "_groups", lambda module: [Group()])
    assert not time_waits(torch.nn.Linear(2, 2), Timeline("forward"), torch.device("cpu"))

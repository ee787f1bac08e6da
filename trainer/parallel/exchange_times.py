"""Marks on a step's timeline when this worker waits for the others' gradients and weights, and computes nothing.

DDP sends gradients beside the backward pass, and lets it wait for them once, at its end (`Strategy.backward`). FSDP2
waits within the passes too: for gathered weights before a block, and for an earlier block's gradients behind one. On a
card such a wait is the stream's and not the host's, so marks on the stream before and behind it tell its length. What
comes with a wait, packing and unpacking, is part of the figure.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd import Variable
from torch.distributed.fsdp import FSDPModule

EXCHANGE = "exchange"


class Timeline(Protocol):
    """A step's phases, of which one is on at any moment (`trainer.measure.step_clock`)."""

    current: str | None

    def mark(self, phase: str | None) -> None:
        """What was on until now ends; `phase` begins, or a pause."""
        ...


def mark_when_computed(loss: torch.Tensor, timeline: Timeline) -> None:
    """Let the exchange begin on the timeline when the backward pass of `loss` has computed all that it can by itself.

    That is before what DDP and FSDP2 do at the end of the pass: these callbacks run in the order of their asking, and
    this one asks first.
    """

    def ask(gradient: torch.Tensor) -> None:
        Variable._execution_engine.queue_callback(lambda: _mark(timeline))  # pyright: ignore[reportAttributeAccessIssue]

    loss.register_hook(ask)


def _mark(timeline: Timeline) -> None:
    if timeline.current is not None:
        timeline.mark(EXCHANGE)


def time_waits(model: nn.Module, timeline: Timeline, device: torch.device) -> bool:
    """Have a model that is spread over the workers (FSDP2) mark each wait within its passes.

    Returns:
        Whether it does: this PyTorch may have other names for what is marked.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules for group in _groups(module)]
    # Where gathers block, as on the CPU, they do so as soon as they are asked for.
    waits = {"wait_for_unshard": _gathers, "post_backward": _reduces}
    if device.type == "cpu":
        waits["unshard"] = _always
    if not groups or not all(callable(getattr(group, name, None)) for group in groups for name in waits):
        return False
    for group in groups:
        for name, happens in waits.items():
            setattr(group, name, _marked(getattr(group, name), group, happens, timeline))
    return True


def _groups(module: FSDPModule) -> list[Any]:
    """What of a module's weights FSDP2 gathers together; it has no public name for it."""
    state = module._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # PyTorch 2.12 on
    single = None if several is not None else getattr(state, "_fsdp_param_group", None)
    return list(several or ()) if single is None else [single]


def _gathers(group: Any) -> bool:
    return getattr(group, "_all_gather_result", True) is not None


def _reduces(group: Any) -> bool:
    return getattr(group, "reduce_grads", True)


def _always(group: Any) -> bool:
    return True


def _marked(
    method: Callable[..., Any], group: Any, happens: Callable[[Any], bool], timeline: Timeline
) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        phase = timeline.current
        if phase is None or phase == EXCHANGE or not happens(group):
            return method(*arguments, **named)
        timeline.mark(EXCHANGE)
        try:
            return method(*arguments, **named)
        finally:
            timeline.mark(phase)

    return run

"""What all kinds have in common: state that goes through tensors and back, bf16 weights, chunks, and its size."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.optim.test_kinds import SHAPES, gradients, ours, stepped, weights
from trainer.errors import UserError
from trainer.optim.kinds.rule_table import RULES, state_bytes
from trainer.optim.optimizers import load_optimizer_tensors, optimizer_tensors

BIG = SHAPES | {"block.conv": (64, 8, 3, 3), "block.large": (128, 512)}
PRECISIONS = {"fp32": None, "bf16_stochastic": "stochastic", "bf16_kahan": "kahan"}


def numbers(kind: str) -> dict[str, Any]:
    """Learning rates at which a few steps change something, and nothing runs away."""
    return {"lr": 1.0, "d0": 1e-4, "growth_rate": 1.5} if kind in ("prodigy", "dadapt_adam") else {"lr": 1e-2}


def made(kind: str, rounding: str | None, shapes: dict[str, tuple[int, ...]] = BIG) -> tuple[Any, Any]:
    named = weights(torch.bfloat16 if rounding else torch.float32, shapes)
    return named, ours(named, kind, rounding=rounding, **numbers(kind))


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", RULES)
def test_state_goes_through_tensors_and_back(kind: str, precision: str) -> None:
    """In the middle of a run, to the bit; the new weights' values need not be those that train."""
    rounding = PRECISIONS[precision]
    named, optimizer = made(kind, rounding)
    stepped(optimizer, named, range(3))
    tensors, values = copied(optimizer_tensors(optimizer, named)), copied(named)
    others, other = made(kind, rounding)
    with torch.no_grad():
        for name, parameter in others.items():
            parameter.copy_(0 if f"{name}.{kind}-trained" in tensors else values[name])
    load_optimizer_tensors(other, others, tensors.items())
    stepped(optimizer, named, range(3, 6))
    stepped(other, others, range(3, 6))
    found, expected = optimizer_tensors(other, others), optimizer_tensors(optimizer, named)
    assert [*found] == [*expected]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert all(torch.equal(others[name], parameter) for name, parameter in named.items())


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("rounding", [None, "stochastic", "kahan"])
def test_state_is_as_large_as_the_plan_says(kind: str, rounding: str | None) -> None:
    named, optimizer = made(kind, rounding)
    stepped(optimizer, named, range(1))
    measured = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    planned = sum(sum(state_bytes(kind, name, tuple(p.shape), p.dtype)) for name, p in named.items())
    planned += sum(2 * parameter.numel() for parameter in named.values()) if rounding == "kahan" else 0
    assert planned == measured


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
def test_bf16_weights_follow_those_in_fp32(kind: str, rounding: str) -> None:
    """Through updates that rounding to the nearest would drop: on average, or with what is kept beside, to 2^-15."""
    named, _ = made(kind, rounding)
    wide = {name: nn.Parameter(parameter.detach().float()) for name, parameter in named.items()}
    start = {name: parameter.detach().clone() for name, parameter in wide.items()}
    settings = numbers(kind)
    settings["lr"] = settings["lr"] * 1e-2 if settings["lr"] < 1 else 0.1
    narrow, reference = ours(named, kind, rounding=rounding, **settings), ours(wide, kind, **settings)
    for step in range(8):
        gradients(step, wide)
        for name, parameter in named.items():
            gradient = wide[name].grad
            assert gradient is not None
            wide[name].grad = gradient.bfloat16().float()
            parameter.grad = gradient.bfloat16()
        narrow.step()
        reference.step()
    for name, parameter in named.items():
        exact = wide[name].detach()
        if rounding == "kahan":
            found = parameter.detach().float() + narrow.state[parameter]["compensation"].float()
            assert float((found - exact).abs().max()) < 2**-12 * float(exact.abs().max())
            continue
        if parameter.numel() < 10_000:
            continue  # the chance of some hundred draws
        went, moved = (parameter.detach().float() - start[name]), exact - start[name]
        assert float((went - moved).mean().abs()) < 0.1 * float(moved.abs().mean()) + 1e-5


@pytest.mark.parametrize("kind", RULES)
def test_chunks_and_memory_layout_change_nothing(kind: str) -> None:
    """Also where gradients are taken times a factor, and given up after their use."""
    named, optimizer = made(kind, "stochastic")
    others, other = made(kind, "stochastic")
    other.chunk_elements, other.free_gradients = 1024, True
    others["block.conv"].data = others["block.conv"].data.contiguous(memory_format=torch.channels_last)
    for step in range(4):
        gradients(step, named)
        optimizer.step()
        gradients(step, others)
        for parameter in others.values():
            assert parameter.grad is not None
            parameter.grad *= 2
        other.step(gradient_factor=0.5)
        assert all(parameter.grad is None for parameter in others.values())
    for name, parameter in named.items():
        torch.testing.assert_close(others[name].detach(), parameter.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", RULES)
def test_a_learning_rate_of_0_changes_no_weight(kind: str) -> None:
    """As the dry run before the first step has it, on gradients of 0 as well."""
    named, optimizer = made(kind, None)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = copied(named)
    stepped(optimizer, named, range(2))
    for parameter in named.values():
        assert parameter.grad is not None
        parameter.grad.zero_()
    optimizer.step()
    assert all(torch.equal(parameter, before[name]) for name, parameter in named.items())


@pytest.mark.parametrize("kind", ["adamw", "adamw_8bit", *RULES])
@pytest.mark.parametrize("other", ["adamw", "adamw_8bit", "lion", "lion_8bit", "adopt"])
def test_state_of_another_kind_is_refused(kind: str, other: str) -> None:
    from trainer.config.schema import OptimizerConfig
    from trainer.optim.optimizers import make_optimizer

    if kind == other:
        return
    named = weights(shapes={"block.large": (128, 512)})

    def optimizer(kind: str) -> torch.optim.Optimizer:
        return make_optimizer(named, OptimizerConfig.model_validate({"kind": kind} | numbers(kind)))

    first = optimizer(kind)
    stepped(first, named, range(1))
    with pytest.raises(UserError, match=f"^optimizer.kind = {other}: .* as {kind} keeps .*optimizer.kind={kind}$"):
        load_optimizer_tensors(optimizer(other), named, optimizer_tensors(first, named).items())


def test_what_trains_later_has_the_learning_rate_that_was_found() -> None:
    named = weights()
    optimizer = ours(named, "prodigy", **numbers("prodigy"))
    first, late = {name: named[name] for name in ("block.matrix", "block.tall")}, named["block.bias"]
    stepped(optimizer, first, range(6))
    found = float(optimizer.state[named["block.matrix"]]["d"])
    assert found > 1e-4
    late.requires_grad_()
    stepped(optimizer, named, range(6, 7))
    assert float(optimizer.state[late]["d"]) == float(optimizer.state[named["block.matrix"]]["d"]) >= found

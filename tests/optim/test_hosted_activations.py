"""Activations that wait in the host's memory: the same bits, the memory that is promised, and no silent faults."""

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.model.compiled import compile_blocks
from trainer.model.denoiser import TrainedModel
from trainer.model.recompute import apply_recompute, repeated_blocks
from trainer.optim.hosted import copy_lanes, hosted_activations
from trainer.optim.hosted.hosted_activations import HostedActivations
from trainer.tiny.tiny_model import make_tiny_unet

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model's tensors are small."""
    monkeypatch.setattr(hosted_activations, "SMALLEST_BYTES", 256)


def tiny() -> TrainedModel:
    torch.manual_seed(0)
    return TrainedModel(make_tiny_unet().train())


def loss_of(model: TrainedModel, side: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents, hidden, pooled = (
        torch.randn(*shape, generator=generator) for shape in ((2, 4, side, side), (2, 77, 160), (2, 80))
    )
    predicted = model(latents, torch.tensor([500, 20]), torch.zeros(2, 6), text_hidden=hidden, text_pooled=pooled)
    return predicted.square().mean()


def gradients(model: TrainedModel, passes: Sequence[int] = (8,)) -> dict[str, Tensor]:
    model.zero_grad()
    for seed, side in enumerate(passes):
        loss_of(model, side, seed).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def host(model: TrainedModel, part: str = "") -> HostedActivations:
    blocks = repeated_blocks(model)
    return HostedActivations(blocks, [name for name in blocks if part in name], CPU)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], each) for name, each in expected.items())


@pytest.mark.e2e
@pytest.mark.parametrize(("part", "recomputes"), [("", False), ("attentions", True), ("resnets.0", False)])
def test_the_same_bits(part: str, recomputes: bool) -> None:
    """Over two passes that are added up, of two shapes; other blocks kept, or recomputed beside them."""
    expected, model = gradients(tiny(), (8, 16)), tiny()
    if recomputes:
        apply_recompute(model, [name for name in repeated_blocks(model) if part not in name])
    hosted = host(model, part)
    assert same(gradients(model, (8, 16)), expected)
    assert hosted.host_bytes > 0 and all(size > 0 for size in hosted.moved_bytes.values())


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks() -> None:
    """What their compiled code keeps moves as well."""
    expected, model = tiny(), tiny()
    for each in (expected, model):
        compile_blocks(each, backend="aot_eager")
    hosted = host(model, "mid_block")
    assert same(gradients(model), gradients(expected))
    assert hosted.host_bytes > 0


@pytest.mark.e2e
def test_host_memory_does_not_grow() -> None:
    """Each place of a pass has what its largest bucket needs, and passes that are given up give it back."""
    model = tiny()
    hosted = host(model)
    gradients(model, (8, 16))
    taken, idle = hosted.host_bytes, sum(map(len, hosted._idle.values()))
    assert taken >= sum(hosted.moved_bytes.values()) > 0 and idle == len(hosted.moved_bytes)
    for passes in ((8,), (16, 8), (8, 8)):
        gradients(model, passes)
        loss_of(model)  # its graph is dropped
    gc.collect()
    assert hosted.host_bytes == taken and sum(map(len, hosted._idle.values())) == idle


def test_passes_without_gradients_move_nothing() -> None:
    model, expected = tiny(), tiny()
    hosted = host(model)
    with torch.no_grad():
        assert torch.equal(loss_of(model), loss_of(expected))
    assert hosted.host_bytes == 0 and not hosted.moved_bytes


class Chain(nn.Module):
    """Six blocks that make one tensor each that they keep, of 1 KiB."""

    def __init__(self, reached: Any = lambda: None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Tanh() for _ in range(6))
        self._reached = reached

    def forward(self, values: Tensor) -> Tensor:
        for block in self.blocks:
            values = block(values) * 2
            values.register_hook(lambda _: self._reached())
        return values


def test_the_device_holds_what_was_promised() -> None:
    """Of six blocks, at the end of the forward pass, those of the last two; in the backward pass, two at a time."""
    held: list[int] = []

    def on_device() -> None:
        found = [each for each in gc.get_objects() if isinstance(each, hosted_activations._Moved)]
        held.append(sum(each.storage is not None for each in found))

    model = Chain(on_device)
    hosted = HostedActivations(blocks := dict(model.blocks.named_children()), blocks, CPU)
    values = torch.ones(2**8, requires_grad=True)
    result = model(values)
    on_device()
    result.sum().backward()
    # Before each block's backward pass, from the last one on: its own, and the one that it has come for before.
    assert held == [2, 2, 1, 1, 1, 1, 1]
    assert sorted(hosted.moved_bytes.values()) == [2**10] * 6


def test_what_is_overdue_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """When two blocks more have computed, also where these send nothing; passes that are given up leave nothing."""
    monkeypatch.setattr(hosted_activations, "PATIENCE", 2)
    model = Chain()
    hosted = HostedActivations(dict(model.blocks.named_children()), ["0", "3"], CPU)
    values = torch.ones(2**8, requires_grad=True)
    for _ in range(2):
        model(values)
        assert not hosted._leaving
    model(values).sum().backward()
    expected = torch.ones(2**8, requires_grad=True)
    Chain()(expected).sum().backward()
    assert values.grad is not None and expected.grad is not None and torch.equal(values.grad, expected.grad)


@pytest.mark.parametrize("copy", [0, 3, 5, 6, 9])
def test_a_failing_copy_is_an_error(copy: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of six that leave and four that come back, whichever it is; of what has to come back, for whoever asks again."""
    made, usual = iter(range(1000)), copy_lanes._copy_after

    def failing(pair: list[Tensor], marks: Any) -> None:
        number = next(made)
        usual(pair, marks)
        if number == copy:
            raise OSError("the bus is gone")

    monkeypatch.setattr(copy_lanes, "_copy_after", failing)
    model = Chain()
    HostedActivations(blocks := dict(model.blocks.named_children()), blocks, CPU)
    values = torch.ones(2**8, requires_grad=True)
    with pytest.raises(OSError, match="the bus is gone"):
        result = model(values).sum()
        result.backward(retain_graph=True)
    if copy >= 6:
        with pytest.raises(OSError, match="the bus is gone"):
            result.backward()
    assert values.grad is None

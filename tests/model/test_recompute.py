"""Recomputed or moved away, activations give the same gradients."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.model import recompute
from trainer.model.denoiser import TrainedModel
from trainer.model.recompute import apply_recompute, gathered_units, offloaded_activations, repeated_blocks
from trainer.parallel.comm import Comm
from trainer.parallel.sharding import shard_model
from trainer.tiny.tiny_model import make_tiny_unet


def gradients(model: TrainedModel, around: Callable[[], AbstractContextManager[None]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, hidden, pooled = (
        torch.randn(*shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 77, 160), (1, 80))
    )
    with around():
        loss = (
            model(latents, torch.tensor([500]), torch.zeros(1, 6), text_hidden=hidden, text_pooled=pooled)
            .square()
            .mean()
        )
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def tiny() -> TrainedModel:
    torch.manual_seed(0)
    return TrainedModel(make_tiny_unet().train())


@pytest.fixture(scope="module")
def plain() -> dict[str, Tensor]:
    return gradients(tiny(), nullcontext)


def test_blocks_are_named_and_cover_nearly_all_weights() -> None:
    model = tiny()
    blocks = repeated_blocks(model)
    assert "unet.mid_block.attentions.0.transformer_blocks.9" in blocks and "unet.down_blocks.0.resnets.0" in blocks
    held = sum(parameter.numel() for block in blocks.values() for parameter in block.parameters())
    assert held > 0.7 * sum(parameter.numel() for parameter in model.parameters())


def test_recomputed(plain: dict[str, Tensor]) -> None:
    model = tiny()
    apply_recompute(model, [name for name in repeated_blocks(model) if "mid_block" in name or "resnets.0" in name])
    found = gradients(model, nullcontext)
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())


@pytest.mark.parametrize("recomputed", [pytest.param(False, marks=pytest.mark.e2e), True])
def test_offloaded(plain: dict[str, Tensor], recomputed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_OFFLOADED_BYTES", 256)
    model = tiny()
    if recomputed:
        apply_recompute(model, repeated_blocks(model))
    found = gradients(model, partial(offloaded_activations, model))
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in plain.items())


@pytest.mark.e2e
def test_gathered_weights_are_not_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that is spread over four workers, the same bytes move as of a plain one."""
    moved: list[int] = []
    to_host = recompute._to_host

    def noting(storage: torch.UntypedStorage, like: Tensor) -> Tensor | None:
        moved.append(storage.nbytes())
        return to_host(storage, like)

    monkeypatch.setattr(recompute, "_OFFLOADED_BYTES", 1024)
    monkeypatch.setattr(recompute, "_to_host", noting)
    totals = []
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        for spread in (False, True):
            model = tiny()
            if spread:
                comm = Comm(0, 4, 0, torch.device("cpu"))
                units = gathered_units(model).values()
                shard_model(model, units, (), comm, compute_dtype=None, reduce_dtype=None, keep_gathered=True)
            moved.clear()
            gradients(model, partial(offloaded_activations, model))
            totals.append(sum(moved))
    finally:
        dist.destroy_process_group()
    assert totals[0] == totals[1] > 0


def test_an_unknown_block() -> None:
    with pytest.raises(KeyError, match="no_such"):
        apply_recompute(tiny(), ["unet.no_such"])

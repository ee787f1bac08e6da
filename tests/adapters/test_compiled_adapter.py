"""Compiled blocks with an adapter in them compute the same, and are compiled once for each kind of block."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.adapters.adapter_config_of import KINDS
from tests.adapters.test_adapter_parts import filled
from trainer.adapters.parameters import adapter_parameters
from trainer.model.compiled import compilations, compile_blocks
from trainer.model.denoiser import TrainedModel
from trainer.model.recompute import apply_recompute, repeated_blocks
from trainer.model_files.run_model import RunModel, open_model

# Of PyTorch's own code, when it looks at what a compiled function is given.
pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")]
SHAPES = ((8, 8, 2), (16, 12, 3))  # latents' height and width, and images


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits


@pytest.fixture(scope="module")
def files(model_folder: Path) -> RunModel:
    return open_model(model_folder)


def trained(files: RunModel, kind: str) -> TrainedModel:
    """With a change that is not none."""
    model = filled(files, **KINDS[kind])
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
    return model.train()


def loss_and_gradients(model: TrainedModel, shape: tuple[int, int, int], autocast: bool) -> dict[str, Tensor]:
    height, width, images = shape
    draw = torch.Generator().manual_seed(height * width)
    latents, times = torch.randn(images, 4, height, width, generator=draw), torch.tensor([500] * images)
    text = {"text_hidden": torch.randn(images, 77, 40, generator=draw)}
    text |= {"text_pooled": torch.randn(images, 24, generator=draw)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = model(latents, times, torch.full((images, 6), 64.0), **text)
    loss = prediction.float().square().mean()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach(), **found}


@pytest.mark.parametrize(("kind", "autocast"), [("lora", False), ("locon", False), ("dora", False), ("lora", True)])
def test_the_same_steps_from_few_compilations(files: RunModel, kind: str, autocast: bool) -> None:
    plain, compiled = trained(files, kind), trained(files, kind)
    before = compilations()
    kinds = compile_blocks(compiled, backend="aot_eager")
    if autocast:
        apply_recompute(compiled, repeated_blocks(compiled))
    for shape in SHAPES:
        expected, found = loss_and_gradients(plain, shape, autocast), loss_and_gradients(compiled, shape, autocast)
        assert found.keys() == expected.keys() and len(found) > len(adapter_parameters(plain)) / 2
        size = max(float(tensor.abs().max()) for name, tensor in expected.items() if name != "loss")
        for name in expected:
            within = (2e-2 if autocast else 1e-5) * (1.0 if name == "loss" else size)
            torch.testing.assert_close(found[name], expected[name], rtol=0, atol=within)
    assert compilations() - before <= 2 * kinds

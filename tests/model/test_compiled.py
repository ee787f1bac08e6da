"""Compiled blocks compute the same, for every shape of bucket, and are compiled once for each kind."""

import logging
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from trainer.model import compiled
from trainer.model.channels_last import prefer_channels_last
from trainer.model.compiled import compilations, compile_blocks
from trainer.model.recompute import apply_recompute, repeated_blocks
from trainer.parallel.comm import keep_group_alive

# Of PyTorch's own code, when it looks at what a compiled function is given.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
# Latents' height and width, and images.
SHAPES = ((8, 8, 2), (8, 12, 2), (16, 8, 2))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit, torch._dynamo.config.accumulated_recompile_limit = limits


def small_unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        attention_head_dim=2,
        transformer_layers_per_block=(2,),
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 24,
        use_linear_projection=True,
        norm_num_groups=8,
    )


def loss_and_gradients(unet: nn.Module, shape: tuple[int, int, int], autocast: bool) -> list[Tensor]:
    height, width, images = shape
    draw = torch.Generator().manual_seed(height * width)
    text, pooled = torch.randn(images, 77, 24, generator=draw), torch.randn(images, 24, generator=draw)
    sizes = {"text_embeds": pooled, "time_ids": torch.randn(images, 6, generator=draw)}
    latents = torch.randn(images, 4, height, width, generator=draw)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = unet(latents, torch.tensor([500] * images), text, added_cond_kwargs=sizes)[0]
    loss = prediction.float().square().mean()
    loss.backward()
    gradients = [p.grad for p in unet.parameters() if p.grad is not None]
    unet.zero_grad()
    return [loss.detach(), *gradients]


@pytest.mark.e2e
@pytest.mark.parametrize(("recompute", "autocast"), [(False, False), (True, True)])
def test_the_same_steps_from_few_compilations(recompute: bool, autocast: bool) -> None:
    plain, unet = small_unet(), small_unet()
    before = compilations()
    kinds = compile_blocks(unet, backend="aot_eager")
    if recompute:
        apply_recompute(unet, repeated_blocks(unet))
    assert kinds < len(repeated_blocks(unet))
    for shape in SHAPES:
        found, expected = loss_and_gradients(unet, shape, autocast), loss_and_gradients(plain, shape, autocast)
        assert len(found) == len(expected)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-5)
    assert compilations() - before <= 2 * kinds


@pytest.mark.e2e
def test_ddp_does_not_cut_blocks_into_pieces() -> None:
    """Buckets smaller than a block; each kind is still compiled as a whole, once."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    keep_group_alive()
    try:
        unet = small_unet()
        before = compilations()
        kinds = compile_blocks(unet, backend="eager")
        wrapped = nn.parallel.DistributedDataParallel(unet, bucket_cap_mb=0.001)
        loss_and_gradients(wrapped, SHAPES[0], False)
        assert compilations() - before == kinds
    finally:
        dist.destroy_process_group()


@pytest.mark.e2e
def test_more_compilations_than_expected_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(compiled, "_PER_KIND", 0)
    unet = small_unet()
    with caplog.at_level(logging.WARNING):
        compile_blocks(unet, backend="eager")
        loss_and_gradients(unet, SHAPES[0], False)
    assert "torch.compile has compiled" in caplog.text


def test_convolutions_in_nhwc_compute_the_same() -> None:
    plain, unet = small_unet(), small_unet()
    prefer_channels_last(unet)
    layouts: list[bool] = []

    def note(module: object, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        layouts.append(output.is_contiguous(memory_format=torch.channels_last))

    unet.conv_in.register_forward_hook(note)
    for one, two in zip(
        loss_and_gradients(unet, SHAPES[1], False), loss_and_gradients(plain, SHAPES[1], False), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    assert layouts == [True]

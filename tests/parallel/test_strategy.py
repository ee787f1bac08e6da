"""What every strategy has in common."""

from inspect import signature

import pytest
import torch
from torch import nn

from trainer.parallel import strategy
from trainer.parallel.strategy import Sharing, Strategy, bucket_bytes


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
def test_the_norm_of_gradients_is_a_number_of_fp32(dtype: torch.dtype, error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator).to(dtype) for shape in [(300, 70), *[(64, 3, 3, 3)] * 9, (7,)]]
    expected = sum(float(gradient.double().square().sum()) for gradient in gradients) ** 0.5
    norm = Strategy(nn.Identity(), {}, 1, Sharing("single")).grad_norm(gradients)[0]
    assert norm.dtype == torch.float32 and float(norm) == pytest.approx(expected, rel=error)


@pytest.mark.parametrize(
    ("of_gradients", "wished_mib", "expected"),
    [
        (2_567_463_684 * 4, None, 64 * 2**20),  # SDXL's UNet in fp32
        (62_437_136, None, 3_902_321),  # the tiny one: a 16th
        (2_567_463_684 * 4, 25, 25 * 2**20),
        (62_437_136, 0.5, 2**19),
        (4, None, 2**20),
    ],
)
def test_gradients_travel_in_several_parts(of_gradients: int, wished_mib: float | None, expected: int) -> None:
    assert bucket_bytes(of_gradients, wished_mib) == expected


def test_ddp_is_given_what_this_pytorch_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as much on PyTorch 2.11, whose DDP lacks two of the arguments."""

    class Of211(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module, broadcast_buffers: bool = True, bucket_cap_mb: int | None = None) -> None:
            raise NotImplementedError

    known = signature(nn.parallel.DistributedDataParallel).parameters
    arguments = strategy._newer_ddp_arguments()
    assert set(arguments) <= set(known) and len(arguments) == 1 + ("batched_grad_copy" in known)
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", Of211)
    assert strategy._newer_ddp_arguments() == {"broadcast_buffers": False}
    assert not strategy.copies_gradients_in_batches()

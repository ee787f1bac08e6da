"""fp32 AdamW over spread weights: the arithmetic gets plain shares, and what comes out is PyTorch's own."""

import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from trainer.config.schema import OptimizerConfig
from trainer.optim.optimizers import make_optimizer


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_shares_are_plain_and_the_steps_are_pytorchs(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    start, gradients = torch.randn(6, 5), [torch.randn(6, 5) for _ in range(4)]
    spread = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    optimizer = make_optimizer({"w": spread}, OptimizerConfig(lr=1e-2))
    plain = nn.Parameter(start.clone())
    reference = torch.optim.AdamW([plain], lr=1e-2, fused=True)
    seen: list[type] = []
    module = sys.modules[torch.optim.Adam.__module__]  # the package gives its name to a function
    theirs = vars(module)["adam"]

    def watched(*lists: list[torch.Tensor], **named: object) -> None:
        seen.extend(type(tensor) for tensors in lists for tensor in tensors)
        theirs(*lists, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "adam", watched)
    for gradient in gradients:
        spread.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        optimizer.step()
        assert seen and DTensor not in seen
        plain.grad = gradient.clone()
        reference.step()
    assert isinstance(spread.data, DTensor) and torch.equal(spread.full_tensor(), plain)
    state, expected = optimizer.state[spread], reference.state[plain]
    for name in ("exp_avg", "exp_avg_sq"):
        assert isinstance(state[name], DTensor) and torch.equal(state[name].full_tensor(), expected[name])

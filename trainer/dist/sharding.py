"""A model whose weights are spread over the workers (FSDP2): wrapping, each worker's share, and the whole again."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.dist.comm import Comm


def shard_model(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    comm: Comm,
    *,
    compute_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    keep_gathered: bool,
) -> None:
    """Spread the parameters of `model` over all workers, along their first dimension; in place.

    Args:
        model: may lie on the meta device; then call `materialize`, and fill each parameter by `copy_share`.
        blocks: modules inside, in any order, that are gathered one by one; the rest is gathered with the model.
        compute_dtype: of the gathered weights; None: that of the shares.
        reduce_dtype: in which gradients travel and are averaged; None: that of the shares.
        keep_gathered: keep gathered weights from the forward pass for the backward pass (ZeRO-2), or free them
            after each block and gather them again (ZeRO-3).
    """
    mesh = init_device_mesh(comm.device.type, (comm.world,))
    # Inputs are left alone: sizes above 256 would be rounded by bf16.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=not keep_gathered, mp_policy=policy)


def materialize(model: nn.Module, device: torch.device) -> None:
    """Give a model's parameters, or this worker's shares of them, memory on `device`; buffers keep their values."""
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])


@torch.no_grad()
def copy_share(parameter: Tensor, whole: Tensor) -> None:
    """Fill a parameter, or this worker's share of it, from the whole tensor; only the share's part of it is read."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    shares = whole.chunk(parameter.device_mesh.size(), dim=0)  # as Shard(0) does
    rank = parameter.device_mesh.get_local_rank()
    if rank < len(shares):
        parameter.to_local().copy_(shares[rank])


def require_gradient_exchange(model: nn.Module, *, required: bool) -> None:
    """Whether the next backward pass averages gradients over the workers, or keeps adding up each worker's own."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(required)


@contextmanager
def gathered(model: nn.Module, *, keep_gathered: bool) -> Iterator[None]:
    """Keeps all weights gathered, so that forward passes inside need no other worker; nothing where none are spread.

    All workers must enter; inside, each may run its own number of forward passes, without gradients.

    Args:
        keep_gathered: as given to `shard_model`, to be so again afterwards.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(not keep_gathered, recurse=False)
            module.reshard()


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor that is spread over the workers, on each of them, who must all ask; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local_tensor(tensor: Tensor) -> Tensor:
    """This worker's share of a tensor, in the same memory; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

"""A model whose weights are spread over the workers (FSDP2): wrapping, each worker's share, and the whole again."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.parallel.comm import Comm


def shard_model(
    model: nn.Module,
    units: Iterable[nn.Module],
    embeddings: Collection[nn.Module],
    comm: Comm,
    *,
    compute_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    keep_gathered: bool,
) -> None:
    """Spread the parameters of `model` over all workers, along their first dimension; in place.

    Args:
        model: may lie on the meta device; then call `materialize`, and fill each parameter by `copy_share`.
        units: modules inside, in any order, that are gathered one by one; the rest is gathered with the model.
        embeddings: those of the units whose backward pass needs no weights: they are freed after the forward pass.
        compute_dtype: of the gathered weights; None: that of the shares.
        reduce_dtype: in which gradients travel and are averaged; None: that of the shares.
        keep_gathered: keep gathered weights from the forward pass for the backward pass (ZeRO-2), or free them
            after each block and gather them again (ZeRO-3).
    """
    mesh = init_device_mesh(comm.device.type, (comm.world,))
    # Inputs are left alone: sizes above 256 would be rounded by bf16.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for module in (*units, model):
        frees = not keep_gathered or module in embeddings
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=frees, mp_policy=policy)
        if module in embeddings:
            sharded.set_unshard_in_backward(False)


def materialize(model: nn.Module, device: torch.device, elsewhere: Collection[nn.Parameter] = ()) -> None:
    """Give a model's parameters, or this worker's shares of them, memory on `device`.

    Buffers keep their values; those that have none get memory as well.

    Args:
        elsewhere: parameters that have memory, wherever it is.
    """
    buffers = {name: buffer for name, buffer in model.named_buffers() if not buffer.is_meta}
    if elsewhere:  # sets compare by identity
        stay = {id(parameter) for parameter in elsewhere}
        model._apply(lambda tensor: tensor if id(tensor) in stay else torch.empty_like(tensor, device=device))
    else:
        model.to_empty(device=device)
    for name, buffer in model.named_buffers():
        if name in buffers:
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


@torch.no_grad()
def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, of which workers may have shares; then all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def prepare_pass(model: nn.Module, *, exchanges_gradients: bool, keeps_gathered: bool) -> None:
    """What the next forward and backward pass does with a spread model.

    Args:
        exchanges_gradients: average gradients over the workers, or keep adding up each worker's own.
        keeps_gathered: keep whole weights after the backward pass, for a further pass before they change.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(exchanges_gradients)
        model.set_reshard_after_backward(not keeps_gathered)


@contextmanager
def gathered(model: nn.Module, embeddings: Collection[nn.Module], *, keep_gathered: bool) -> Iterator[None]:
    """Keeps all weights gathered, so that forward passes inside need no other worker; nothing where none are spread.

    All workers must enter; inside, each may run its own number of forward passes, without gradients.

    Args:
        embeddings, keep_gathered: as given to `shard_model`, to be so again afterwards.
    """
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    _give_back_cache(model)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(not keep_gathered or module in embeddings, recurse=False)
            module.reshard()
        _give_back_cache(model)


def _give_back_cache(model: nn.Module) -> None:
    """On a card, what was freed on FSDP2's own streams is kept for those streams alone: give it to all."""
    if next(model.parameters()).is_cuda:
        torch.cuda.empty_cache()


def local_tensor(tensor: Tensor) -> Tensor:
    """This worker's share of a tensor, in the same memory; others as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

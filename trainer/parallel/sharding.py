"""A model whose weights are spread over the workers (FSDP2): wrapping, each worker's share, and the whole again."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from trainer.parallel.comm import Comm, keep_group_alive
from trainer.parallel.local_shard import local_part


def shard_model(
    model: nn.Module,
    units: Iterable[nn.Module],
    embeddings: Collection[nn.Module],
    comm: Comm,
    *,
    compute_dtype: torch.dtype | None,
    reduce_dtype: torch.dtype | None,
    keep_gathered: bool,
    within: int | None = None,
) -> None:
    """Spread the parameters of `model` over the workers, along their first dimension; in place.

    Args:
        model: may lie on the meta device; then call `materialize`, and fill each parameter by `copy_share`.
        units: modules inside, in any order, that are gathered one by one; the rest is gathered with the model.
        embeddings: those of the units whose backward pass needs no weights: they are freed after the forward pass.
        compute_dtype: of the gathered weights; None: that of the shares.
        reduce_dtype: in which gradients travel and are averaged; None: that of the shares.
        keep_gathered: keep gathered weights from the forward pass for the backward pass (ZeRO-2), or free them
            after each block and gather them again (ZeRO-3).
        within: spread them over so many workers, neighbours in rank, and have as many groups of them as there are hold
            the same (HSDP: Zhao et al. 2023, section 3.2.2); None: over all.
    """
    mesh = _mesh(comm, within or comm.world)
    # Inputs are left alone: sizes above 256 would be rounded by bf16.
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=reduce_dtype, cast_forward_inputs=False)
    for module in (*units, model):
        frees = not keep_gathered or module in embeddings
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=frees, mp_policy=policy)
        if module in embeddings:
            sharded.set_unshard_in_backward(False)


def _mesh(comm: Comm, within: int) -> DeviceMesh:
    """The workers as a row, or as one row for each group."""
    if within == comm.world:
        return init_device_mesh(comm.device.type, (comm.world,))
    return _grouped(dist.group.WORLD, comm.device.type, comm.world // within, within, comm.timeout_s)


@cache
def _grouped(
    world: dist.ProcessGroup | None, device_type: str, replicas: int, within: int, timeout_s: float
) -> DeviceMesh:
    """Opened once for all models of a process: what NCCL keeps for a group is not given back."""
    mesh = init_device_mesh(device_type, (replicas, within), mesh_dim_names=("replicate", "shard"))
    for name in ("replicate", "shard"):
        group = mesh.get_group(name)
        if dist.get_backend(group) != "fake":  # which sends nothing, and waits for nobody
            _set_pg_timeout(timedelta(seconds=timeout_s), group)  # of its own, a group of gloo's waits half an hour
        keep_group_alive(group)
    return mesh


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
    part, first_row = local_part(parameter)
    part.copy_(whole if part is parameter else whole[first_row : first_row + len(part)])


@torch.no_grad()
def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, of which workers may have shares; then all of them must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def prepare_pass(
    model: nn.Module, *, exchanges_gradients: bool, keeps_gathered: bool, between_replicas: bool = True
) -> None:
    """What the next forward and backward pass does with a spread model.

    Args:
        exchanges_gradients: average gradients over the workers, or keep adding up each worker's own.
        between_replicas: if so, over those of all groups, or keep adding up each group's own. Of one group: true.
        keeps_gathered: keep whole weights after the backward pass, for a further pass before they change.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(exchanges_gradients)
        if not between_replicas:
            model.set_requires_all_reduce(False)
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

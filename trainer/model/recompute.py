"""Trading time for memory block by block: which activations are computed again in the backward pass, or moved away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
_OFFLOADED_BYTES = 2**20
"""Smaller tensors stay where they are: moving one costs more time than it is worth."""


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that the UNet and the text encoders are made of, by name: transformer and residual blocks, layers.

    They are what FSDP2 gathers one by one, what is recomputed, and what torch.compile compiles.
    """
    return {name: module for name, module in model.named_modules() if type(module).__name__ in _BLOCKS}


def apply_recompute(model: nn.Module, blocks: Iterable[str]) -> None:
    """Keep only the inputs of these blocks in the forward pass, and run them again in the backward pass.

    Call it before the model is wrapped. Numbers do not change: SDXL draws nothing in its blocks.

    Args:
        blocks: names from `repeated_blocks`.

    Raises:
        KeyError: the model has no such block.
    """
    modules = repeated_blocks(model)
    for name in blocks:
        module = modules[name]
        module.forward = _recomputed(module.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    from torch.utils.checkpoint import checkpoint

    def run(*args: Any, **kwargs: Any) -> Any:
        import torch

        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return run


@contextmanager
def offloaded_activations(model: nn.Module) -> Iterator[None]:
    """Around a forward pass: what it keeps for the backward pass waits in the host's memory, and comes back when used.

    Weights stay, and so does what is small. A tensor that is kept several times moves once.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    moved: dict[int, tuple[StorageWeakRef, Tensor]] = {}

    def pack(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata in weights or storage.nbytes() < _OFFLOADED_BYTES or tensor.is_sparse:
            return tensor
        known = moved.get(storage._cdata)
        if known is None or known[0].expired():
            whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage)
            known = StorageWeakRef(storage), _to_host(whole)
            moved[storage._cdata] = known
        return known[1], tensor.device, tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        host, device, shape, stride, offset = packed
        whole = _to_device(host, device)
        return whole.as_strided(shape, stride, offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _to_host(tensor: Tensor) -> Tensor:
    import torch

    if tensor.device.type == "meta":  # a plan: only the size matters
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True) if device.type != "meta" else tensor.clone()

"""Trading time for memory block by block: which activations are computed again in the backward pass, or moved away."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer")
_RESIZERS = ("Downsample2D", "Upsample2D")
_EMBEDDINGS = ("CLIPTextEmbeddings",)
_OFFLOADED_BYTES = 2**20
"""Smaller tensors stay where they are: moving one costs more time than it is worth."""


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks that the UNet and the text encoders are made of, by name: transformer and residual blocks, layers.

    They are what is recomputed and what torch.compile compiles.
    """
    return _of_kind(model, _BLOCKS)


def gathered_units(model: nn.Module) -> dict[str, nn.Module]:
    """What FSDP2 gathers one by one: the repeated blocks, and the largest of the modules outside of them."""
    return _of_kind(model, (*_BLOCKS, *_RESIZERS, *_EMBEDDINGS))


def embeddings(model: nn.Module) -> dict[str, nn.Module]:
    """Those of the gathered units whose backward pass needs no weights."""
    return _of_kind(model, _EMBEDDINGS)


def release_blocks(parameters: Iterable[str], units: Iterable[str]) -> dict[str, str]:
    """The block of each parameter: the innermost of the units that holds it, or else the module that has it.

    Args:
        units: names of the modules that the model repeats, such as its transformer blocks.
    """
    found = {name: name.rpartition(".")[0] for name in parameters}
    for unit in sorted(units, key=len):
        found |= {name: unit for name in found if name.startswith(f"{unit}.")}
    return found


def _of_kind(model: nn.Module, classes: tuple[str, ...]) -> dict[str, nn.Module]:
    # FSDP2 gives what it has wrapped a class of its own below the module's.
    return {
        name: module
        for name, module in model.named_modules()
        if any(kind.__name__ in classes for kind in type(module).__mro__)
    }


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

    Weights stay, and so does what is small. A tensor that is kept several times moves once. Of a model that is spread
    over workers, weights are what its modules hold while they run: each block's are gathered just before.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    weights: set[int] = set()
    moved: dict[int, tuple[StorageWeakRef, Tensor | None]] = {}

    def note_weights(module: nn.Module, arguments: object) -> None:
        weights.update(parameter.untyped_storage()._cdata for parameter in module.parameters())

    def pack(tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata in weights or storage.nbytes() < _OFFLOADED_BYTES or tensor.is_sparse:
            return tensor
        known = moved.get(storage._cdata)
        if known is None or known[0].expired():
            known = StorageWeakRef(storage), _to_host(storage, tensor)
            moved[storage._cdata] = known
        return known[1], storage.nbytes() // tensor.itemsize, tensor.dtype, tensor.device, _layout(tensor)

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, torch.Tensor):
            return packed
        host, numel, dtype, device, layout = packed
        whole = torch.empty(numel, dtype=dtype, device=device)
        if host is not None:
            whole.copy_(host.view(dtype), non_blocking=True)
        return whole.as_strided(*layout)

    gathered_by = (model, *gathered_units(model).values())
    hooks = [module.register_forward_pre_hook(note_weights) for module in gathered_by]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset()


def _to_host(storage: torch.UntypedStorage, like: Tensor) -> Tensor | None:
    """The storage's bytes in the host's memory; None on the meta device, where a plan asks for sizes alone."""
    import torch

    if like.is_meta:
        return None
    whole = torch.empty(0, dtype=torch.uint8, device=like.device).set_(storage)
    host = torch.empty(whole.shape, dtype=torch.uint8, pin_memory=like.is_cuda)
    return host.copy_(whole, non_blocking=True)

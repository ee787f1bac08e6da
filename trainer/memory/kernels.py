"""What CUDA's or the CPU's kernels do, on tensors of the device "meta": attention, autocast, scratch memory."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.memory.holdings import Kernels

_FLASH_WIDTH = 256  # of a head, at most


@contextlib.contextmanager
def emulated_kernels(kernels: Kernels, autocast: torch.dtype | None) -> Iterator[Callable[[], None]]:
    """Replaces the functions that layers call, for tensors of the device "meta".

    On "meta", PyTorch would choose attention's plain formula, and knows no autocast.

    Yields:
        to be called at the end of the forward pass: autocast forgets its copies of the weights.
    """
    replaced = {"scaled_dot_product_attention": _attention(kernels, F.scaled_dot_product_attention)}
    casts = _Casts(autocast)
    if autocast is not None:
        narrow = {"linear": F.linear, "conv2d": F.conv2d} | replaced
        replaced |= {name: casts.around(function, autocast) for name, function in narrow.items()}
        if kernels == "cuda":  # the CPU's autocast leaves them as they are
            wide = {"layer_norm": F.layer_norm, "group_norm": F.group_norm, "interpolate": F.interpolate}
            replaced |= {name: casts.around(function, torch.float32) for name, function in wide.items()}
    real = {name: getattr(F, name) for name in replaced}
    for name, function in replaced.items():
        setattr(F, name, function)
    try:
        yield casts.forget
    finally:
        for name, function in real.items():
            setattr(F, name, function)


class _Casts:
    """Autocast's casts, and its store of weights that were cast once in this forward pass."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._copies: dict[int, Tensor] = {}
        self._keeps = True

    def around(self, function: Callable[..., Any], dtype: torch.dtype) -> Callable[..., Any]:
        """`function` with all its float tensors cast to `dtype`."""

        def run(*args: Any, **kwargs: Any) -> Any:
            return function(
                *(self._cast(value, dtype) for value in args),
                **{key: self._cast(value, dtype) for key, value in kwargs.items()},
            )

        return run

    def forget(self) -> None:
        self._copies.clear()
        self._keeps = False

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (self._keeps and dtype == self._dtype and value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._copies:
            self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]


def _attention(kernels: Kernels, real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type != "meta":
            return real(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        ops = torch.ops.aten
        if kernels == "cpu":
            flash = ops._scaled_dot_product_flash_attention_for_cpu
            return flash(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        if attn_mask is None and query.dtype != torch.float32 and query.shape[-1] <= _FLASH_WIDTH:
            return ops._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
            attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        efficient = ops._scaled_dot_product_efficient_attention
        return efficient(query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale)[0]

    return attention


def _flash_backward_bytes(args: Any) -> int:
    """FlashAttention-2's sum of the query's gradient in fp32, and a row sum; rows padded to 128, heads to 32."""
    batch, heads, rows, width = args[1].shape
    rows, width = -(-rows // 128) * 128, -(-width // 32) * 32
    return batch * heads * rows * (width + 1) * 4


def _efficient_backward_bytes(args: Any) -> int:
    """The row sums, and fp32 sums of the gradients where they are not fp32 themselves."""
    batch, heads, rows, width = args[1].shape
    return batch * heads * rows * (1 + (width if args[1].dtype != torch.float32 else 0)) * 4


# What CUDA kernels allocate within one operation.
HIDDEN_BYTES: dict[Any, Callable[[Any], int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward.default: _flash_backward_bytes,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward.default: _efficient_backward_bytes,
}

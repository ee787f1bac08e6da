"""Counts the bytes that one forward and backward pass keeps alive, on tensors that have no memory ("meta").

The pass is the real one, of the real modules at their real sizes; only the kernels do nothing. Weights and the
gradients that have reached them are left out: who holds them, and how often, is the strategy's part
(`strategy_peak.py`).
"""

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from trainer.memory.holdings import Kernels
from trainer.memory.kernels import HIDDEN_BYTES, emulated_kernels

MarkKind = Literal[
    "forward", "after forward", "end of forward", "before backward", "gradient", "backward", "end of backward"
]

_ATEN = torch.ops.aten
_FLOPS = flop_registry | {  # PyTorch's own table leaves out the CPU's attention
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[_ATEN._scaled_dot_product_flash_attention],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
}
_CUDA_BLOCK = 512  # the caching allocator's granularity, bytes


@dataclass(frozen=True)
class Segment:
    """What happens up to a mark, in bytes of everything but weights and gradients that have arrived.

    Attributes:
        peak: highest level over that at the segment's start.
        net: level at its end over that at its start.
        mark: what happens then: `forward` of a unit begins or is over (`after forward`), the whole forward pass ends,
            `before backward` of a unit the gradient of its output is there, the `gradient` of a parameter is there,
            `backward` of a unit ends.
        name: of the unit or the parameter.
        gradient_bytes: of the parameter's gradient.
        flops: floating-point operations of products and attention; a multiplication with an addition is two.
    """

    peak: int
    net: int
    mark: MarkKind
    name: str
    gradient_bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Trace:
    """One forward and backward pass of a model.

    Attributes:
        segments: from its beginning to its end.
        shapes: of all parameters, by name.
        trains: names of those that get gradients.
        unit_of: the innermost marked unit that holds a parameter; absent for those outside of all units.
        recomputable: units that may be recomputed; None: all.
        embeddings: units whose backward pass needs no weights.
        packed_bytes: of weights that are held in fewer bits and are no parameters.
        moved_bytes: of activations that are moved to the host's memory, by block.
    """

    segments: tuple[Segment, ...]
    shapes: dict[str, tuple[int, ...]]
    trains: frozenset[str]
    unit_of: dict[str, str]
    recomputable: frozenset[str] | None = None
    embeddings: frozenset[str] = frozenset()
    packed_bytes: int = 0
    moved_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def saved_bytes(self) -> int:
        """Alive at the end of the forward pass."""
        return sum(segment.net for segment in self.segments[: self._forward_end() + 1])

    @property
    def forward_flops(self) -> int:
        """Of the forward pass; see `Segment.flops`."""
        return sum(segment.flops for segment in self.segments[: self._forward_end() + 1])

    @property
    def flops(self) -> int:
        """Of the whole pass, with what is computed again."""
        return sum(segment.flops for segment in self.segments)

    def blocks(self) -> "dict[str, Block]":
        """What each recomputable unit's forward pass keeps and costs, where no units lie within another."""
        found: dict[str, Block] = {}
        for segment, following in itertools.pairwise(self.segments[: self._forward_end() + 1]):
            if segment.mark == "forward" and (self.recomputable is None or segment.name in self.recomputable):
                found[segment.name] = Block(max(following.net, 0), following.flops)
        return found

    def _forward_end(self) -> int:
        return next(i for i, segment in enumerate(self.segments) if segment.mark == "end of forward")


@dataclass(frozen=True)
class Block:
    """A unit's forward pass: bytes that it leaves for the backward pass, and its operations."""

    saved_bytes: int
    flops: int


def trace_pass(
    model: nn.Module,
    loss: Callable[[], Tensor],
    units: Mapping[str, nn.Module],
    kernels: Kernels,
    autocast: torch.dtype | None = None,
    held: Iterable[Tensor] = (),
) -> Trace:
    """Run `loss` and its backward pass, and say what is alive when.

    Args:
        model: on the device "meta"; those of its parameters that train ask for gradients.
        loss: runs the forward pass; makes its own inputs on "meta", which count as activations.
        units: modules of the model whose beginning and end are marked, by name in the model.
        kernels: whose memory is counted: attention, autocast and the allocator's rounding differ.
        autocast: as `torch.autocast` would do on that device around the forward pass; it does not know "meta".
        held: not counted either, such as the weights of frozen models that run within `loss`.
    """
    live = _LiveBytes(_CUDA_BLOCK if kernels == "cuda" else 1)
    parameters = dict(model.named_parameters())
    for tensor in (*parameters.values(), *model.buffers(), *held):
        live.ignore(tensor)
    handles: list[Any] = []
    for name, parameter in parameters.items():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(_gradient_hook(live, name)))
    for name, unit in units.items():
        handles.append(unit.register_forward_pre_hook(_forward_hook(live, name), with_kwargs=True))
        handles.append(unit.register_forward_hook(_output_hook(live, name)))
    try:
        with live, emulated_kernels(kernels, autocast) as end_forward:
            value = loss()
            end_forward()
            live.mark("end of forward", "")
            torch.autograd.backward(value)
            del value
            live.mark("end of backward", "")
    finally:
        for handle in handles:
            handle.remove()
    return Trace(
        segments=tuple(live.segments),
        shapes={name: tuple(parameter.shape) for name, parameter in parameters.items()},
        trains=frozenset(name for name, parameter in parameters.items() if parameter.requires_grad),
        unit_of=_innermost_units(parameters, units),
    )


def trace_peak(
    run: Callable[[], object], held: Iterable[Tensor], kernels: Kernels, autocast: torch.dtype | None = None
) -> int:
    """Most bytes that `run` keeps alive beside `held`, such as one pass of the frozen VAE."""
    live = _LiveBytes(_CUDA_BLOCK if kernels == "cuda" else 1)
    for tensor in held:
        live.ignore(tensor)
    with live, emulated_kernels(kernels, autocast):
        run()
        live.mark("end of forward", "")
    return live.segments[0].peak


def _innermost_units(parameters: Iterable[str], units: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for unit in sorted(units, key=len):
        found.update({name: unit for name in parameters if name.startswith(unit + ".")})
    return found


class _LiveBytes(TorchDispatchMode):
    """Follows each storage from the operation that makes it to its end."""

    def __init__(self, granularity: int) -> None:
        super().__init__()
        self.segments: list[Segment] = []
        self._granularity = granularity
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._level = self._start = self._peak = self._flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self._flops += count(*args, **(kwargs or {}), out_val=out)
        hidden = HIDDEN_BYTES.get(func)
        if hidden is not None and self._granularity > 1:
            self._peak = max(self._peak, self._level + hidden(args))
        return out

    def ignore(self, tensor: Tensor) -> None:
        """Never count this tensor."""
        self._sizes[tensor.untyped_storage()._cdata] = 0

    def take(self, tensor: Tensor) -> int:
        """Stop counting this tensor, and return its bytes."""
        key = tensor.untyped_storage()._cdata
        size = self._sizes.get(key, 0)
        self._sizes[key] = 0
        self._level -= size
        return size

    def mark(self, kind: MarkKind, name: str, gradient_bytes: int = 0) -> None:
        """End a segment."""
        peak, net = self._peak - self._start, self._level - self._start
        self.segments.append(Segment(peak, net, kind, name, gradient_bytes, self._flops))
        self._flops = 0
        self._start = self._peak = self._level

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = -(-storage.nbytes() // self._granularity) * self._granularity
        self._sizes[key] = size
        self._references[key] = weakref.ref(storage, lambda _: self._forget(key))
        self._level += size
        self._peak = max(self._peak, self._level)

    def _forget(self, key: int) -> None:
        self._level -= self._sizes.pop(key)
        del self._references[key]


def _gradient_hook(live: _LiveBytes, name: str) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.mark("gradient", name, live.take(parameter.grad))
        parameter.grad = None

    return hook


def _forward_hook(live: _LiveBytes, name: str) -> Callable[..., tuple[Any, Any]]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        live.mark("forward", name)
        wanting = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.requires_grad]
        if not wanting or not torch.is_grad_enabled():
            return args, kwargs
        # As FSDP2 does it: the gradients of all inputs come through here, once the unit's backward pass is done.
        through = iter(_MarkBackward.apply(live, name, *wanting))  # pyright: ignore[reportGeneralTypeIssues, reportArgumentType]
        marked = {id(value): next(through) for value in wanting}
        new_kwargs = {key: marked.get(id(value), value) for key, value in kwargs.items()}
        return tuple(marked.get(id(value), value) for value in args), new_kwargs

    return hook


def _output_hook(live: _LiveBytes, name: str) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        live.mark("after forward", name)
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor) and value.requires_grad:
                value.register_hook(lambda _: live.mark("before backward", name))

    return hook


class _MarkBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, live: _LiveBytes, name: str, *inputs: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.live, ctx.name = live, name
        return inputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.live.mark("backward", ctx.name)
        return (None, None, *gradients)

"""Activations of chosen blocks in the host's memory from the forward pass to the backward pass, copied beside both.

What such a block makes for its own backward pass leaves when the block has computed, and comes back when the backward
pass reaches the chosen block that ran after it:

    computation    forward of block 1    2         3         4 ...           backward of 4    3         2         1
    send lane                            1 -> host 2 -> host 3 -> host
    fetch lane                                                               3 -> device      2         1

The device's memory is let go of at fixed points of the program, so that the plan counts it to the byte: a block's
activations when the second of the chosen blocks after it has computed (`IN_FLIGHT`), or the sixteenth of all blocks
(`PATIENCE`), once their copy has arrived. Those that are still there when the backward pass begins stay until it has
used them. Every arrow is a mark that the card's queues wait for (`copy_lanes`). Nothing is computed otherwise, and all
copies are of whole bytes.

A pass whose backward never comes leaves nothing behind: all that waits hangs on the pass's graph.
"""

import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.optim.hosted.copy_lanes import HostMemory, Lane, Mark, compute_after, mark_computed
from trainer.optim.hosted.hosted_state import ALIGNMENT

KEY = "memory.offload_activations"
IN_FLIGHT = 2
"""Blocks whose activations are on the device and on their way to the host, at most, when another one begins."""
PATIENCE = 16
"""Blocks of any kind that compute until they are waited for."""
SMALLEST_BYTES = 2**20
"""Smaller tensors stay where they are: moving one costs more time than it is worth."""


class _Stay:
    """What one run of a block has left, from its forward pass to its backward pass.

    Attributes:
        position: of the run among those of its pass; `previous`: the one before.
        moved: by address of their storages; each lives as long as the graph holds something in it.
        stays: addresses of storages that are not the block's own: its inputs and its weights.
        host: where it waits.
        sent: behind the copies to the host; `fetched`: behind those back to the device.
        left: how many blocks had computed when it was sent.
        asked: they have been asked for; `opened`: they have been waited for.
    """

    def __init__(
        self, block: nn.Module, inputs: Iterable[Any], previous: "_Stay | None", end: "Callable[[_Stay], None]"
    ) -> None:
        self._end = end
        self.position: int = previous.position + 1 if previous else 0
        self.previous = previous
        self.moved = weakref.WeakValueDictionary[int, _Moved]()
        weights = [*block.parameters(), *block.buffers()]
        self.stays = {tensor.untyped_storage()._cdata for tensor in (*weights, *_tensors(inputs))}
        self._shapes = {tuple(weight.shape): weight.dtype for weight in weights}
        self.host: HostMemory | None = None
        self.sent: Mark = None
        self.fetched: Mark = None
        self.left = 0
        self.asked = self.opened = False

    def __del__(self) -> None:
        self._end(self)

    def is_cast(self, tensor: Tensor) -> bool:
        """Whether it looks like a weight in another dtype: autocast holds on to its casts until the pass is over."""
        shape = tuple(tensor.shape)
        dtype = self._shapes.get(shape) or self._shapes.get(shape[::-1])
        return dtype is not None and dtype != tensor.dtype


class _Moved:
    """A storage that several saved tensors may lie in.

    Attributes:
        storage: on the device; None while its bytes are in the host's memory alone.
        host: uint8 [num_bytes], its place there.
    """

    def __init__(self, stay: _Stay, storage: torch.UntypedStorage) -> None:
        self.stay, self.num_bytes = stay, storage.nbytes()
        self.storage: torch.UntypedStorage | None = storage
        self.host: Tensor | None = None


class _Packed(NamedTuple):
    """A saved tensor as the graph holds it."""

    moved: _Moved
    dtype: torch.dtype
    first: int
    shape: torch.Size
    strides: tuple[int, ...]


class HostedActivations:
    """Sends away what chosen blocks keep for their backward passes, and has it back in time.

    Call it before the model is wrapped, after `compile_blocks` and `apply_recompute`. A pass without gradients is as
    before.

    Args:
        blocks: modules that compute one after the other, by name, none of which lies within another.
        moved: names of those whose activations wait in the host's memory; none of them is recomputed.
        device: where they compute; on "meta", where a plan asks for sizes alone, memory comes and goes without copies.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], moved: Collection[str], device: torch.device) -> None:
        self._device = device
        self._lanes = None if device.type == "meta" else (Lane(device), Lane(device))
        self._newest: Callable[[], _Stay | None] = lambda: None
        self._leaving = deque[weakref.ref[_Stay]]()
        self._idle: dict[int, list[HostMemory]] = {}
        self.host_bytes = 0
        """Taken of the host's memory so far; it stays from pass to pass."""
        self.moved_bytes: dict[str, int] = {}
        """What the last run of each block has sent away."""
        self._computed = 0  # blocks, so far
        for name, block in blocks.items() if moved else ():
            run = partial(self._run, name, block) if name in moved else self._pass_by
            block.forward = partial(run, block.forward)

    def _pass_by(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        if torch.is_grad_enabled():
            self._computed += 1
            self._let_go()
        return found

    def _run(self, name: str, block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        stay = _Stay(block, (*args, *kwargs.values()), self._newest(), self._end)
        with torch.autograd.graph.saved_tensors_hooks(partial(_pack, stay), self._unpack):
            found = forward(*args, **kwargs)
        self.moved_bytes[name] = sum(moved.num_bytes for moved in stay.moved.values())
        self._computed += 1
        if stay.moved:
            self._send(stay)
        self._let_go()
        return found

    @torch.no_grad()
    def _send(self, stay: _Stay) -> None:
        self._newest = weakref.ref(stay)
        if self._lanes is not None:
            members, computed = [*stay.moved.values()], mark_computed(self._device)
            memory = self._host_memory(stay, sum(_aligned(moved.num_bytes) for moved in members))
            first = 0
            for moved in members:
                moved.host = memory[first : first + moved.num_bytes]
                first += _aligned(moved.num_bytes)
                assert moved.storage is not None
                stay.sent = self._lanes[0].copy(moved.host, _bytes_of(moved.storage), (computed, stay.sent))
        stay.left = self._computed
        self._leaving.append(weakref.ref(stay))

    def _let_go(self) -> None:
        while self._leaving:
            oldest = self._leaving[0]()
            overdue = oldest is None or self._computed - oldest.left >= PATIENCE
            if not overdue and len(self._leaving) <= IN_FLIGHT:
                return
            del oldest
            for gone in self._arrived():
                gone.storage = None

    def _arrived(self) -> Iterator[_Moved]:
        """Wait for the oldest that is on its way to the host; what is still needed of it."""
        stay = self._leaving.popleft()()
        if stay is not None:
            compute_after(stay.sent, self._device)
            yield from [*stay.moved.values()]

    @torch.no_grad()
    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        moved = packed.moved
        if not moved.stay.opened:
            self._open(moved.stay)
        assert moved.storage is not None
        whole = torch.empty(0, dtype=packed.dtype, device=self._device)
        return whole.set_(moved.storage, packed.first, packed.shape, packed.strides)

    def _open(self, stay: _Stay) -> None:
        """The backward pass has come to a block: have its activations there, and the next one's on their way."""
        while self._leaving:  # they stay, but their memory is not used again before it has been read
            for _ in self._arrived():
                pass
        self._fetch(stay)
        # A failed copy raises here, and again for whoever asks again.
        compute_after(stay.fetched, self._device)
        stay.opened = True
        if stay.previous is not None:
            self._fetch(stay.previous)

    def _fetch(self, stay: _Stay) -> None:
        if stay.asked:
            return
        stay.asked = True
        wanted = [moved for moved in stay.moved.values() if moved.storage is None]
        targets = [torch.empty(moved.num_bytes, dtype=torch.uint8, device=self._device) for moved in wanted]
        free = mark_computed(self._device)  # what had this memory before may still be computed with
        for moved, target in zip(wanted, targets, strict=True):
            moved.storage = target.untyped_storage()
            if self._lanes is not None:
                assert moved.host is not None
                stay.fetched = self._lanes[1].copy(target, moved.host, (free, stay.sent, stay.fetched))

    def _host_memory(self, stay: _Stay, num_bytes: int) -> Tensor:
        """uint8, at least `num_bytes` long, until `stay` is over; that of the same place in a pass before, if it does.

        A run's passes are alike but for their buckets: each place soon has the memory that its largest one needs.
        """
        idle = self._idle.setdefault(stay.position, [])
        found = next((memory for memory in idle if len(memory.memory) >= num_bytes), None)
        if found is None:
            if idle:
                self._drop(idle.pop())
            found = HostMemory(num_bytes, self._device, KEY)
            self.host_bytes += len(found.memory)
        else:
            idle.remove(found)
        stay.host = found
        return found.memory

    def _drop(self, memory: HostMemory) -> None:
        for lane in self._lanes or ():  # a pass that was given up may still be on its way
            lane.wait()
        self.host_bytes -= len(memory.memory)

    def _end(self, stay: _Stay) -> None:
        """Nothing of it is needed any more; the graph has let go of its memory on the device just now."""
        if stay.host is None:
            return
        if isinstance(stay.fetched, Future):
            wait([stay.fetched])  # and if it failed: whoever asks for what was copied is told
        elif not stay.opened:
            compute_after(stay.fetched, self._device)
        self._idle[stay.position].append(stay.host)


def _pack(stay: _Stay, tensor: Tensor) -> Any:
    """What the graph holds for a saved tensor: where it will be, or itself if it is not to move."""
    storage = tensor.untyped_storage()
    if storage._cdata in stay.stays or storage.nbytes() < SMALLEST_BYTES or tensor.is_sparse:
        return tensor
    moved = stay.moved.get(storage._cdata)
    if moved is None:
        if stay.is_cast(tensor):
            return tensor
        moved = _Moved(stay, storage)
        stay.moved[storage._cdata] = moved
    return _Packed(moved, tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT

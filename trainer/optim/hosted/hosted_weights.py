"""Weights of a model's blocks in the host's memory, on the device only while their block computes.

Each block's weights are a run of bytes in the host's memory, and two slots on the device have room for the largest.
Blocks compute one after the other: forward, and in the reverse order backward, where each is recomputed first, so that
nothing which the forward pass keeps lies in a slot:

    fetch lane     bytes of the next block   -> slot     after what used the slot before
    computation    forward, or recomputation, backward and update, in the slot     after its bytes have been fetched
    send lane      slot -> bytes of the block            after its update

so that while one block computes, the next one's weights come and, in the backward pass, the last one's go. Every arrow
is a mark that the card's queues wait for (`copy_lanes`). Nothing is computed otherwise: the block finds its weights in
its parameters, which between passes lie in the host's memory, for whoever reads or changes them there.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.optim.hosted.copy_lanes import HostMemory, Lane, Mark, compute_after, mark_computed
from trainer.optim.hosted.hosted_state import ALIGNMENT

KEY = "memory.offload_weights"


class _Member(NamedTuple):
    """A parameter of a block, and where it lies within the block's bytes."""

    parameter: nn.Parameter
    first: int
    dtype: torch.dtype
    shape: torch.Size
    strides: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """Its values within bytes of the block."""
        last = self.first + self.dtype.itemsize * self.shape.numel()
        return memory[self.first : last].view(self.dtype).as_strided(self.shape, self.strides)


@dataclass
class _Home:
    """A block's weights in the host's memory; `sent` is behind the last copy into it."""

    members: tuple[_Member, ...]
    host: HostMemory
    sent: Mark = None

    @property
    def versions(self) -> tuple[int, ...]:
        """Others after each change of a weight."""
        return tuple(member.parameter._version for member in self.members)


@dataclass
class _Slot:
    """Memory of the device for one block's weights.

    Attributes:
        block: whose weights are in it, or on their way; empty: none's. `versions`: of them as they were fetched.
        fetched: behind the copy into it; `free`: behind all that has used what was in it before.
        computes: the block's parameters are in it.
    """

    memory: Tensor
    free: Mark
    block: str = ""
    versions: tuple[int, ...] = ()
    fetched: Mark = None
    computes: bool = False


class HostedWeights:
    """Weights of blocks that compute one at a time, and are recomputed in the backward pass.

    Around the backward pass `begin` and `settle`; within it, `changing` around each block's update.

    Args:
        blocks: modules laid out on the meta device, by name. They get parameters in the host's memory, without values,
            and a forward pass that fetches them.
        device: where they compute.
    """

    def __init__(self, blocks: Mapping[str, nn.Module], device: torch.device) -> None:
        self._device = device
        self._fetching, self._sending = Lane(device), Lane(device)
        self._homes = {name: _lay_out(block, device) for name, block in blocks.items()}
        self._slots: list[_Slot] = []
        self._order: dict[str, int] = {}  # in which blocks compute, as far as it has been seen
        self._names: list[str] = []
        self._backward = False
        self.finish_block: Callable[[str], None] = lambda block: None
        """Told of a block that the backward pass has left, and that was not updated; it may be, within."""
        for name, block in blocks.items():
            block.forward = partial(self._run, name, block.forward)

    @property
    def parameters(self) -> set[nn.Parameter]:
        """Those of the blocks."""
        return {member.parameter for home in self._homes.values() for member in home.members}

    @property
    def host_bytes(self) -> int:
        """In the host's memory."""
        return sum(len(home.host.memory) for home in self._homes.values())

    @property
    def device_bytes(self) -> int:
        """Of the slots."""
        return sum(len(slot.memory) for slot in self._slots)

    def begin(self) -> None:
        """A backward pass begins."""
        self._backward = True
        if self._names:
            self._foresee(self._names[-1])

    def settle(self) -> None:
        """It is over: all weights are in the host's memory, for whoever reads them there."""
        self._leave()
        self._backward = False
        self._sending.wait()

    @contextmanager
    def changing(self, block: str) -> Iterator[None]:
        """Inside, a block's weights are on the device; then, changed, on their way home."""
        home = self._homes.get(block)
        if home is None:
            yield
            return
        slot = self._slot_of(block)
        if slot is None or not slot.computes:
            slot = self._bring(block)
        yield
        num_bytes, updated = len(home.host.memory), mark_computed(self._device)
        home.sent = slot.free = self._sending.copy(home.host.memory, slot.memory[:num_bytes], (updated,))
        self._put_away(slot, slot.free)

    def _run(self, name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A block's forward pass; one in a backward pass leaves the weights there, for the gradients and the update."""
        if name not in self._order:
            self._order[name] = len(self._names)
            self._names.append(name)
        slot = self._bring(name)
        if self._backward:
            return forward(*args, **kwargs)
        try:
            return forward(*args, **kwargs)
        finally:
            self._put_away(slot, mark_computed(self._device))

    @torch.no_grad()
    def _bring(self, name: str) -> _Slot:
        """Have a block's parameters on the device, and the next one's on their way."""
        found = self._slot_of(name)
        if found is not None and found.computes:
            return found
        self._leave(name)
        home = self._homes[name]
        if found is None or found.versions != home.versions:  # fetched before someone changed them
            found = self._fetch(name, found)
        compute_after(found.fetched, self._device)
        _point(home, found.memory)
        found.computes = True
        following = self._order.get(name, 0) + (-1 if self._backward else 1)
        if 0 <= following < len(self._names):
            self._foresee(self._names[following])
        return found

    def _leave(self, but: str = "") -> None:
        """Blocks compute one after the other: the backward pass is over of those that are still on the device."""
        for slot in self._slots:
            if slot.computes and slot.block != but:
                self.finish_block(slot.block)
            if slot.computes and slot.block != but:
                self._put_away(slot, mark_computed(self._device))

    def _foresee(self, name: str) -> None:
        if self._slot_of(name) is None:
            self._fetch(name)

    def _slot_of(self, name: str) -> _Slot | None:
        return next((slot for slot in self._slots if slot.block == name), None)

    @torch.no_grad()
    def _fetch(self, name: str, into: _Slot | None = None) -> _Slot:
        """Begin to fetch a block's weights into a slot in which none computes; there always is one."""
        self._make_slots()
        idle = [slot for slot in self._slots if not slot.computes]
        slot = into or next((slot for slot in idle if not slot.block), idle[0])
        home = self._homes[name]
        # One that was fetched and not used is free as it was before: copies of one lane go one after the other.
        target = slot.memory[: len(home.host.memory)]
        slot.fetched = self._fetching.copy(target, home.host.memory, (slot.free, home.sent))
        slot.block, slot.versions = name, home.versions
        return slot

    def _make_slots(self) -> None:
        if self._slots:
            return
        largest = max(len(home.host.memory) for home in self._homes.values())
        with torch.inference_mode(False):  # they serve passes with gradients too
            memories = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(2)]
        free = mark_computed(self._device)  # what had this memory before may still be computed with
        self._slots += [_Slot(memory, free) for memory in memories]

    def _put_away(self, slot: _Slot, free: Mark) -> None:
        """Parameters are in the host's memory again; the slot may be used when `free` is reached."""
        home = self._homes[slot.block]
        _point(home, home.host.memory)
        slot.block, slot.free, slot.computes = "", free, False


def _point(home: _Home, memory: Tensor) -> None:
    with torch.inference_mode(False):
        for member in home.members:
            member.parameter.data = member.of(memory)


def _lay_out(block: nn.Module, device: torch.device) -> _Home:
    """Give a block parameters in the host's memory in place of those on the meta device."""
    places, first = list[tuple[nn.Module, str, int]](), 0
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            places.append((module, name, first))
            first += -(-parameter.nbytes // ALIGNMENT) * ALIGNMENT
    host, members = HostMemory(first, device, KEY), list[_Member]()
    for module, name, begin in places:
        old = module._parameters[name]
        assert old is not None
        new = nn.Parameter(torch.empty(0, dtype=old.dtype), requires_grad=old.requires_grad)
        module._parameters[name] = new
        members.append(_Member(new, begin, old.dtype, old.shape, old.stride()))
    home = _Home(tuple(members), host)
    _point(home, host.memory)
    return home

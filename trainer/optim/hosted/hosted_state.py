"""The optimizer's state in the host's memory, on the device only for the block of the model that is being updated.

Each block's state is a run of bytes in the host's memory, and two slots on the device have room for the largest. In
steady state, block by block in the order of the step before:

    fetch lane     bytes of the next block   -> slot     after the slot's last block has been sent home
    computation    update in the slot                    after its bytes have been fetched
    send lane      slot -> bytes of the block            after its update

so that while one block is updated, and while the backward pass goes on to the next one, the next one's state comes and
the last one's goes. Every arrow is an event that the card's queues wait for; the host waits once, at the step's end.
Nothing is computed otherwise: the optimizer finds the state's numbers where it looks for them. On the CPU the same
copies are made one after the other.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from trainer.optim.hosted.copy_lanes import HostMemory, Lane, Mark, compute_after, mark_computed

ALIGNMENT = 16
"""Bytes; of a tensor within its block, as vectorized kernels want it."""


class _Place(NamedTuple):
    """Where a tensor of the state lies within its block's bytes.

    Attributes:
        member: number of its parameter within the block.
        key: its name in the parameter's state.
        first: byte.
    """

    member: int
    key: str
    first: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, memory: Tensor) -> Tensor:
        """The tensor within bytes of a block."""
        last = self.first + self.dtype.itemsize * torch.Size(self.shape).numel()
        return memory[self.first : last].view(self.dtype).as_strided(self.shape, self.strides)


@dataclass
class _Home:
    """A block's state in the host's memory.

    Attributes:
        is_in: it is there, or on its way back; not after `HostedState.clear`.
        sent: behind the last copy into it.
    """

    places: tuple[_Place, ...]
    host: HostMemory
    is_in: bool = True
    sent: Mark = None


@dataclass
class _Slot:
    """Memory of the device for one block's state.

    Attributes:
        block: whose state is in it, or on its way; empty: none's.
        fetched: behind the copy into it; `free`: behind all that has used what was in it before.
    """

    memory: Tensor
    free: Mark
    block: str = ""
    fetched: Mark = None


class HostedState:
    """State of one model's optimizer; `begin`, then `on_device` around each block's update, then `settle`.

    Between steps `optimizer.state` holds tensors in the host's memory; numbers of a parameter, such as its step, stay
    where the optimizer has them.

    Args:
        members: the parameters of each block, by its name.
        device: where they are updated.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, members: Mapping[str, Sequence[nn.Parameter]], device: torch.device
    ) -> None:
        self._optimizer, self._members, self._device = optimizer, members, device
        self._fetching, self._sending = Lane(device), Lane(device)
        self._homes: dict[str, _Home] = {}
        self._slots: list[_Slot] = []
        self._turn, self._last = 0, ""
        self._next: dict[str, str] = {}  # the block after each, as of late; after "", the first

    @property
    def host_bytes(self) -> int:
        """In the host's memory."""
        return sum(len(home.host.memory) for home in self._homes.values())

    @property
    def device_bytes(self) -> int:
        """Of the slots."""
        return sum(len(slot.memory) for slot in self._slots)

    def begin(self) -> None:
        """A step begins; its first block may come already."""
        self._last = ""
        self._fetch_after("")

    @contextmanager
    def on_device(self, block: str) -> Iterator[None]:
        """Inside, the optimizer's state of a block is on the device; then on its way back."""
        slot = self._slot_with(block)
        if slot is not None:
            compute_after(slot.fetched, self._device)
            self._point(block, slot.memory)
        yield
        if slot is None or not self._is_all_in(block, slot):
            self._move_in(block)
        else:
            home, slot.free = self._homes[block], mark_computed(self._device)
            num_bytes = len(home.host.memory)
            home.sent = slot.free = self._sending.copy(home.host.memory, slot.memory[:num_bytes], (slot.free,))
            self._point(block, home.host.memory)
        if slot is not None:
            slot.block = ""
        self._next[self._last], self._last = block, block
        self._fetch_after(block)

    def settle(self) -> None:
        """Until all state is in the host's memory, for whoever reads it there."""
        self._sending.wait()

    def adopt(self) -> None:
        """Take what was put into `optimizer.state` from elsewhere, wherever it lies."""
        for block in self._members:
            if self._tensors(block):
                self._move_in(block)

    def clear(self) -> None:
        """The optimizer's state was dropped; its memory is kept for the next."""
        self.settle()
        for home in self._homes.values():
            home.is_in = False
        for slot in self._slots:
            slot.block = ""

    def _fetch_after(self, block: str) -> None:
        """Begin to fetch what came after a block in the step before."""
        following = self._next.get(block)
        if following is not None and following not in [slot.block for slot in self._slots]:
            self._fetch(following)

    def _slot_with(self, block: str) -> _Slot | None:
        """That of a block's state, fetched now if it was not foreseen; None of a block that has none yet."""
        found = next((slot for slot in self._slots if slot.block == block), None)
        return found or self._fetch(block)

    def _fetch(self, block: str) -> _Slot | None:
        home = self._homes.get(block)
        if home is None or not home.is_in:
            return None
        self._make_slots()
        slot = self._slots[self._turn]
        self._turn = 1 - self._turn
        # A slot whose block was fetched and not used, because its gradients were not finite, is free as it was before:
        # copies of one lane go one after the other.
        target = slot.memory[: len(home.host.memory)]
        slot.fetched = self._fetching.copy(target, home.host.memory, (slot.free, home.sent))
        slot.block = block
        return slot

    def _make_slots(self) -> None:
        """Two that are as large as the largest block."""
        largest = max(len(home.host.memory) for home in self._homes.values())
        if self._slots and len(self._slots[0].memory) >= largest:
            return
        self._fetching.wait()  # the allocator knows nothing of the lanes
        self._sending.wait()
        self._slots.clear()
        memories = [torch.empty(largest, dtype=torch.uint8, device=self._device) for _ in range(2)]
        # What had this memory before may still be computed with.
        free = mark_computed(self._device)
        self._slots += [_Slot(memory, free) for memory in memories]

    def _tensors(self, block: str) -> list[tuple[int, str, Tensor]]:
        """A block's state but for numbers: its parameter within the block, name, tensor."""
        return [
            (number, key, value)
            for number, parameter in enumerate(self._members[block])
            for key, value in sorted(self._optimizer.state.get(parameter, {}).items())
            if isinstance(value, Tensor) and value.ndim
        ]

    def _is_all_in(self, block: str, slot: _Slot) -> bool:
        """Whether the state is what was fetched; a weight may have got its first."""
        found, start = self._tensors(block), slot.memory.untyped_storage().data_ptr()
        same_number = len(found) == len(self._homes[block].places)
        return same_number and all(value.untyped_storage().data_ptr() == start for _, _, value in found)

    @torch.no_grad()
    def _move_in(self, block: str) -> None:
        """Make a home for state that has none, or has grown; the host waits for the copies."""
        found, places, first = self._tensors(block), list[_Place](), 0
        for number, key, value in found:
            places.append(_Place(number, key, first, value.dtype, tuple(value.shape), value.stride()))
            first += -(-value.nbytes // ALIGNMENT) * ALIGNMENT
        if not places:
            return
        home = self._homes.get(block)
        if home is None or home.is_in or home.places != tuple(places):
            self._fetching.wait()  # of the old one
            self._sending.wait()
            home = _Home(tuple(places), HostMemory(first, self._device))
        for place, (_, _, value) in zip(places, found, strict=True):
            place.of(home.host.memory).copy_(value)
        home.is_in = True
        self._homes[block] = home
        self._point(block, home.host.memory)

    def _point(self, block: str, memory: Tensor) -> None:
        """Have the optimizer find a block's state in these bytes."""
        members = self._members[block]
        for place in self._homes[block].places:
            self._optimizer.state[members[place.member]][place.key] = place.of(memory)

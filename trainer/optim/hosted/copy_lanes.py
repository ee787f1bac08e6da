"""Copies between a card and the host's memory beside the computation, in an order that marks keep."""

import mmap
import weakref
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from trainer.errors import UserError

Mark = torch.cuda.Event | Future[None] | None
"""A point in the work of a card's queue, or of a thread, that other work can wait for; None: nothing to wait for."""


class Lane:
    """Copies one after the other, beside the computation: a CUDA stream, or on the CPU a thread.

    The thread saves no time, but makes the CPU keep the same order by the same marks: what is forgotten there shows in
    the numbers of a test.
    """

    def __init__(self, device: torch.device) -> None:
        on_card = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_card else None
        self.thread = None if on_card else ThreadPoolExecutor(1, thread_name_prefix="copies")
        """Of copies on the CPU."""

    def copy(self, target: Tensor, source: Tensor, after: Iterable[Mark]) -> Mark:
        """Copy when all of `after` is done; the mark behind the copy."""
        if self._stream is None:
            assert self.thread is not None
            return self.thread.submit(_copy_after, [target, source], tuple(after))
        for mark in after:
            if isinstance(mark, torch.cuda.Event):
                self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        done = torch.cuda.Event()
        done.record(self._stream)
        return done

    def wait(self) -> None:
        """Until the host may read and write what was copied."""
        if self._stream is not None:
            self._stream.synchronize()
        if self.thread is not None:
            self.thread.submit(_nothing).result()


@torch.no_grad()
def _copy_after(pair: list[Tensor], marks: Iterable[Mark]) -> None:
    for mark in marks:
        if isinstance(mark, Future):
            mark.result()
    # Whoever waits for the mark shall be the one who lets go of them: the thread has to have forgotten them by then.
    source, target = pair.pop(), pair.pop()
    target.copy_(source)


def _nothing() -> None:
    """Comes after all that a thread was given before."""


def mark_computed(device: torch.device) -> Mark:
    """Behind all that the computation has been given so far; the CPU has done it when it comes here."""
    if device.type != "cuda":
        return None
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream(device))
    return done


def compute_after(mark: Mark, device: torch.device) -> None:
    """What the computation is given from here on waits for `mark`: the card's queue, not the host; or this thread."""
    if isinstance(mark, torch.cuda.Event):
        torch.cuda.current_stream(device).wait_event(mark)
    elif mark is not None:
        mark.result()


class HostMemory:
    """So many bytes of the host's memory, page-locked for a card, so that copies run beside all else.

    PyTorch's allocator of page-locked memory rounds up to a power of two, by a third on the mean; pages of our own that
    are locked afterwards take what they hold. They are shared ones, as of `trainer.checkpoint.saver`: after a fork,
    this process would write into copies of private ones, which the card does not see.

    Attributes:
        memory: uint8 [num_bytes].
    """

    def __init__(self, num_bytes: int, device: torch.device, key: str = "memory.offload_optimizer") -> None:
        """
        Args:
            key: of the configuration, which asks for it.
        Raises:
            UserError: the pages cannot be locked.
        """
        self.memory = torch.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), dtype=torch.uint8)
        if device.type != "cuda":
            return
        cuda = torch.cuda.cudart()
        assert cuda is not None
        with torch.cuda.device(device):
            failed = int(cuda.cudaHostRegister(self.memory.data_ptr(), len(self.memory), 0))
        if failed:
            raise UserError(
                f"{key}: {len(self.memory) / 2**30:.2f} GiB of the host's memory could not be "
                f"locked for the card (CUDA error {failed}); free some RAM, or set it to false"
            )
        # It holds the memory until the pages are unlocked; at the process's end CUDA does so by itself.
        weakref.finalize(self, _unlock, self.memory).atexit = False


def _unlock(memory: Tensor) -> None:
    cuda = torch.cuda.cudart()
    assert cuda is not None
    cuda.cudaHostUnregister(memory.data_ptr())

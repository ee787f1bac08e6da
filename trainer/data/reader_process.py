"""Reader processes: torch's DataLoader over a fork server, hardened for the life of a training run.

The fork server imports torch once and every reader is a fork of it. Readers leave SIGINT and SIGTERM to the
training process, so that it can finish its step; they end with it, however it ends; and one that dies ends
the iteration with an error that names it.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Fill = Callable[[Tensor, Any], Any]
"""(buffer uint8 [slot_bytes], request) -> a small value that tells what was put into the buffer."""
_HELD_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_ALIGN = 64
_PRELOAD = ["trainer.data.loader", "trainer.data.images", "trainer.model.text"]


def start_reader_server() -> None:
    """Start the fork server, which goes on importing what readers need beside the caller; once per process.

    Calling it before the model is loaded hides the server's imports.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    resource_tracker.ensure_running()  # first, because it unblocks the signals that are blocked below
    # A blocked signal stays blocked in what is started: from their first instruction on, neither the server nor
    # its forks can be ended by a Ctrl-C or a SIGTERM that was sent to the whole process group.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class _SlotReader(Dataset):
    """What a reader process holds: the function that reads, and the memory it shares with the training process."""

    fill: Fill
    slots: Tensor

    def __getitem__(self, index: tuple[int, Any]) -> Any:
        slot, request = index
        return self.fill(self.slots[slot], request)


def read_in_processes(
    fill: Fill, requests: Iterable[Any], slot_bytes: int, workers: int, prefetch: int
) -> Generator[tuple[Tensor, Any], None, None]:
    """`fill(buffer, request)` for every request, in order, computed ahead of need by `workers` processes.

    Results lie in slots of one shared buffer that are used in turn: handing over a new piece of shared memory
    with each message costs a millisecond of handshakes, more than the reading.

    Args:
        fill: must be picklable; its return value travels as a message and should be small.
        slot_bytes: most bytes that a request fills.
        prefetch: requests to keep ready, rounded up to a multiple of `workers`.

    Yields:
        The filled buffer uint8, valid until the next one is taken, and the value that `fill` returned.

    Raises:
        RuntimeError: a reader process died. It is found at once, or within five seconds.
    """
    start_reader_server()
    others = set(multiprocessing.active_children())
    per_worker = max(1, -(-prefetch // workers))
    # DataLoader sends the next request just before it returns a result: one slot more than are under way.
    num_slots = per_worker * workers + 1
    aligned_bytes = -(-slot_bytes // _ALIGN) * _ALIGN
    slots = torch.zeros(num_slots, aligned_bytes, dtype=torch.uint8).share_memory_()
    with warnings.catch_warnings():
        # How many readers there are is the user's choice (data.workers), also where the cores are fewer.
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        loader = DataLoader(
            _SlotReader(fill, slots),
            batch_size=None,
            sampler=((number % num_slots, request) for number, request in enumerate(requests)),  # pyright: ignore[reportArgumentType]
            num_workers=workers,
            prefetch_factor=per_worker,
            collate_fn=_unchanged,
            worker_init_fn=_begin_reader,
            multiprocessing_context="forkserver",
            generator=torch.Generator(),  # otherwise it would draw from, and so change, the global generator
        )
    results = iter(loader)
    processes = [child for child in multiprocessing.active_children() if child not in others]
    return _in_turn(results, slots, processes)


def _in_turn(
    results: Iterator[Any], slots: Tensor, processes: list[BaseProcess]
) -> Generator[tuple[Tensor, Any], None, None]:
    try:
        for number, result in enumerate(results):
            yield slots[number % len(slots)], result
    except (RuntimeError, OSError, EOFError) as error:
        dead = [f"{process.pid} ({_ending(process.exitcode)})" for process in processes if not process.is_alive()]
        if not dead:
            raise
        raise RuntimeError(
            f"data reader process {', '.join(dead)} died; if it was killed for want of memory, lower "
            "data.workers or data.prefetch_batches"
        ) from error
    finally:
        # Here and not in DataLoader's destructor, which comes late where an exception keeps it alive.
        for process in processes:
            process.terminate()


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"signal {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"


def _unchanged(item: Any) -> Any:
    return item


def _begin_reader(worker_id: int) -> None:
    for watch in (_end_with_parent, _end_when_parent_asks):
        threading.Thread(target=watch, name=f"{watch.__name__}-{worker_id}", daemon=True).start()


def _end_with_parent() -> None:
    # DataLoader's own watch looks at the fork server, which lives as long as any of its forks does.
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _end_when_parent_asks() -> None:
    # Python and DataLoader end left-over readers with SIGTERM and then wait for them, so that it must not be
    # ignored when it comes from there.
    parent = multiprocessing.parent_process()
    while parent is not None:
        if signal.sigwaitinfo(_HELD_SIGNALS).si_pid == parent.pid:
            os._exit(1)

"""Reader processes: each with a line of its own to the training process, so that none can hold up another's end.

The fork server imports torch once and every reader is a fork of it. A reader and the training process talk over one
socket that nobody else holds: when either ends, in the middle of a message as well, the other one knows at once.
Nothing else is shared but the buffer, no lock and no queue. (torch's DataLoader shares both: a reader that is killed
while it holds the lock of DataLoader's event, or writes to its queue, leaves the training process waiting for ever.)

Readers leave SIGINT and SIGTERM to the training process, so that it can finish its step.
"""

import atexit
import mmap
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing import reduction
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from trainer.data.fork_server import fork_into_server, fork_server, hold_signals
from trainer.freed_memory import give_back

Fill = Callable[[Tensor, Any], Any]
"""(buffer uint8 [slot_bytes], request) -> a small value that tells what was put into the buffer."""
_ALIGN = 64
_END_S = 5.0
"""How long a reader that was told to end is waited for."""
_PRELOAD = ["trainer.data.loader", "trainer.data.images", "trainer.model.text"]


def start_reader_server() -> None:
    """Start the fork server, which goes on importing what readers need beside the caller; once per process."""
    fork_server(_PRELOAD)


def fork_reader_server(begin: Callable[[], None]) -> None:
    """The same at once and in this process's memory, where it has imported all that; else nothing.

    See `fork_into_server` for when, and for `begin`.
    """
    if all(name in sys.modules for name in _PRELOAD):
        fork_into_server(begin)


class _Slots:
    """Memory of `count` buffers that readers share with the training process, while they are started.

    Not in /dev/shm, which a container may keep small, and gone with the last process that uses it.
    """

    def __init__(self, fd: int, count: int, num_bytes: int) -> None:
        self.fd, self.count, self.num_bytes = fd, count, num_bytes

    def tensor(self) -> Tensor:
        """uint8 [count, num_bytes], all 0 at first."""
        mapped = mmap.mmap(self.fd, self.count * self.num_bytes)
        return torch.frombuffer(mapped, dtype=torch.uint8).view(self.count, self.num_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return _received_slots, (reduction.DupFd(self.fd), self.count, self.num_bytes)


def _received_slots(fd: Any, count: int, num_bytes: int) -> _Slots:
    return _Slots(fd.detach(), count, num_bytes)


@dataclass(frozen=True)
class _Reader:
    process: BaseProcess
    connection: Connection

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Any:
        try:
            failure, result = self.connection.recv()
        except (OSError, EOFError) as error:
            raise self._death() from error
        if failure is not None:
            raise result from RuntimeError(f"in data reader process {self.process.pid}:\n{failure}")
        return result

    def _death(self) -> RuntimeError:
        self.process.join(_END_S)
        return RuntimeError(
            f"data reader process {self.process.pid} ({_ending(self.process.exitcode)}) died; if it was killed for "
            "want of memory, lower data.workers or data.prefetch_batches"
        )


class ReaderProcesses:
    """`fill(buffer, request)` for every request, in order, computed ahead of need by several processes.

    Iterating gives the filled buffer uint8, valid until the next one is taken, and the value that `fill` returned.
    What `fill` raises, is raised here; a RuntimeError, at once, where a reader died. Close it in any case.

    Results lie in slots of one shared buffer that are used in turn: handing over a new piece of shared memory
    with each message costs a millisecond of handshakes, more than the reading.
    """

    def __init__(self, fill: Fill, requests: Iterable[Any], slot_bytes: int, workers: int, prefetch: int) -> None:
        """Start them, and send what they are to begin with.

        Args:
            fill: must be picklable; its return value travels as a message and should be small.
            slot_bytes: most bytes that a request fills.
            prefetch: requests to keep ready, rounded up to a multiple of `workers`.
        """
        start_reader_server()
        under_way = max(1, -(-prefetch // workers)) * workers
        # The next request is sent before a result is handed over, whose slot is still in use.
        num_slots, num_bytes = under_way + 1, -(-slot_bytes // _ALIGN) * _ALIGN
        self._requests = enumerate(requests)
        self._next = self._sent = 0
        self._readers: list[_Reader] = []
        # Otherwise the interpreter would wait, as it ends, for readers that wait for requests.
        atexit.register(self.close)
        fd = os.memfd_create("data-readers", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, num_slots * num_bytes)
            slots = _Slots(fd, num_slots, num_bytes)
            self._slots = slots.tensor()
            for number in range(workers):
                self._readers.append(_start(fill, slots, number))
            for _ in range(under_way):
                self._send_one()
        except BaseException:
            self.close()
            raise
        finally:
            os.close(fd)

    def __iter__(self) -> "ReaderProcesses":
        return self

    def __next__(self) -> tuple[Tensor, Any]:
        if self._next == self._sent:
            raise StopIteration
        number = self._next
        result = self._readers[number % len(self._readers)].receive()
        self._next += 1
        self._send_one()
        return self._slots[number % len(self._slots)], result

    def _send_one(self) -> None:
        for number, request in islice(self._requests, 1):
            self._readers[number % len(self._readers)].send((number % len(self._slots), request))
            self._sent += 1

    def close(self) -> None:
        """End the readers; what they had read ahead is dropped."""
        atexit.unregister(self.close)
        self._next = self._sent
        for reader in self._readers:
            reader.connection.close()
        for reader in self._readers:
            reader.process.join(_END_S)
            if reader.process.exitcode is None:  # in a read that does not return, of a network drive that is gone
                reader.process.kill()


def _start(fill: Fill, slots: _Slots, number: int) -> _Reader:
    context = fork_server(_PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=_read, args=(fill, slots, theirs), name=f"data-reader-{number}", daemon=True)
    process.start()
    theirs.close()
    return _Reader(process, ours)


def _ending(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        return f"signal {signal.Signals(-exitcode).name}"
    return f"exit code {exitcode}"


def _read(fill: Fill, slots: _Slots, connection: Connection) -> None:
    """The life of a reader: answer requests (slot, request) with (None, result) or (traceback, error)."""
    # Done by the fork server, unless a library had started one before.
    hold_signals()
    torch.set_num_threads(1)
    buffers = slots.tensor()
    os.close(slots.fd)
    give_back()  # `fill` brought tokenizers along, in parsing which a multiple of their memory was taken
    requests: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, requests), daemon=True).start()
    while True:
        slot, request = requests.get()
        try:
            answer = None, fill(buffers[slot], request)
        except Exception as error:  # whatever it is, the training process is to raise it
            answer = traceback.format_exc(), error
        with suppress(BrokenPipeError, ConnectionResetError):  # the line is closed, which ends this process
            connection.send(answer)


def _receive(connection: Connection, requests: "queue.SimpleQueue[tuple[int, Any]]") -> None:
    """Takes requests as they come, so that neither side ever waits for the other with a message in its hand."""
    try:
        while True:
            requests.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # the training process has closed the line, or has ended

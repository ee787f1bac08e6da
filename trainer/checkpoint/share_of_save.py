"""A worker's threads that save its share: one copies what changes with the next update, the other writes it.

Where each host has a disk of its own, the writer also sends what the others lack, and a thread for each of its peers
writes what that sends. Whoever fails goes on sending and receiving as many bytes, so that no other worker waits; they
learn of it from `Saver.flags`.
"""

import contextlib
import errno
import itertools
import mmap
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trainer.checkpoint.pieces import FileLayout, Piece, bytes_of, lay_out
from trainer.checkpoint.routes import Arrival, routes_of
from trainer.checkpoint.write import TensorFile
from trainer.disks.carry import PIECES, begin_send, receive
from trainer.disks.run_disks import Disks
from trainer.faults import planned

_SMALL_BYTES = 64 << 10
_FLUSH_BYTES = 1 << 30


class NotFinite(Exception):
    """A tensor that was to be saved holds NaN or infinity; the message names it."""


class Room:
    """How many bytes may be held in copies.

    Attributes:
        wanted: set once a copy waits for room, or none will any more.
    """

    def __init__(self, num_bytes: int) -> None:
        self._free, self._size, self._changed, self._closed = num_bytes, num_bytes, threading.Condition(), False
        self.wanted = threading.Event()

    def take(self, num_bytes: int) -> bool:
        """Wait for room; whether there is any, and not `close` was called. What is larger than all of it goes alone."""
        with self._changed:
            if self._free < min(num_bytes, self._size):
                self.wanted.set()
            self._changed.wait_for(lambda: self._closed or self._free >= min(num_bytes, self._size))
            self._free -= num_bytes
            return not self._closed

    def give_back(self, num_bytes: int) -> None:
        """Of a copy that is written."""
        with self._changed:
            self._free += num_bytes
            self._changed.notify()

    def close(self) -> None:
        """Nothing more is to be copied."""
        with self._changed:
            self._closed = True
            self._changed.notify()


class ShareOfSave:
    """A worker's threads and what they share."""

    def __init__(
        self,
        disks: Disks,
        device: torch.device,
        stream: "torch.cuda.Stream | None",
        files: Sequence[tuple[Path, TensorFile]],
        staging_bytes: int | None,
        step: int,
    ) -> None:
        """Start them. `files`: each with the place where it is written; `stream`: of the copies from a card."""
        self._disks, self._step = disks, step
        self._device, self._stream = device, stream
        self.num_written = 0
        self._jobs = [(place, file, lay_out(file, disks.comm.rank, disks.workers_here)) for place, file in files]
        layouts = [layout for _, _, layout in self._jobs]
        self._routes = routes_of(disks, [file for _, file, _ in self._jobs], layouts)
        self._still_writing = itertools.count(len(self._routes.arrivals), -1)
        mine = bytes_of(layouts)
        self._room = Room(mine if staging_bytes is None else min(mine, staging_bytes))
        self._full: queue.Queue[tuple[int, Piece, Tensor] | None] = queue.Queue()
        self.copied, self.written = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        ready = None
        if device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
        threading.Thread(target=self._copy, args=(ready,), name="save: copy", daemon=True).start()
        threading.Thread(target=self._write, name="save: write", daemon=True).start()
        for sender in self._routes.arrivals:
            threading.Thread(target=self._receive, args=(sender,), name="save: receive", daemon=True).start()

    def _copy(self, ready: "torch.cuda.Event | None") -> None:
        try:
            # On a card, on a stream of its own, so that only the copies are waited for.
            stream = self._stream
            if stream is not None:
                # A thread begins with card 0, and leaving the stream below would open a context there: memory that
                # nobody has planned.
                torch.cuda.set_device(self._device)
            with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                if stream is not None and ready is not None:
                    stream.wait_event(ready)
                for number, (_, _, layout) in enumerate(self._jobs):
                    for piece in layout.pieces:
                        if not self._room.take(piece.num_bytes):
                            return
                        buffer = _buffer(piece.num_bytes, pinned=stream is not None)
                        _fill(buffer, piece)
                        if stream is not None:
                            stream.synchronize()
                        self._full.put((number, piece, buffer))
        except Exception as error:
            self.failure = self.failure or error
        finally:
            self._full.put(None)
            self.copied.set()
            self._room.wanted.set()

    def _write(self) -> None:
        descriptors: list[int] = []
        unflushed = sent = 0
        try:
            for path, file, layout in self._jobs:
                descriptors.append(self._open(path, file, layout))
            # Training waits for the copies and for nothing else: what writes would take memory's and the host's time.
            self._room.wanted.wait()
            while (job := self._full.get()) is not None:
                number, piece, buffer = job
                _fail_if_planned(self._disks.comm.rank, self._step)
                _require_finite(self._jobs[number][1].name, piece, buffer)
                with self._sent(number, piece, buffer):
                    sent += 1
                    _write_all(descriptors[number], buffer.numpy().data, piece.offset)
                self.num_written += piece.num_bytes
                unflushed += piece.num_bytes
                if unflushed > _FLUSH_BYTES:  # else the last flush takes minutes, of which nothing is known
                    os.fdatasync(descriptors[number])
                    unflushed = 0
                self._room.give_back(piece.num_bytes)
            for descriptor in descriptors:
                os.fsync(descriptor)
        except Exception as error:
            self.failure = self.failure or error
            self._room.close()
        finally:
            for descriptor in descriptors:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            self._send_in_place_of(sent)
            self._one_has_written()

    @contextlib.contextmanager
    def _sent(self, number: int, piece: Piece, buffer: Tensor) -> Iterator[None]:
        """Meanwhile, a piece goes to the disks that lack it."""
        to = self._routes.to.get((number, piece.name), ())
        under_way = [begin_send(self._disks, buffer, rank, PIECES) for rank in to]
        try:
            yield
        finally:
            for work in under_way:
                work.wait()

    def _send_in_place_of(self, sent: int) -> None:
        """After a failure: bytes without a meaning for all pieces but the first so many, for which others wait."""
        if not self._routes.to:
            return
        pieces = ((number, piece) for number, (_, _, layout) in enumerate(self._jobs) for piece in layout.pieces)
        try:
            for number, piece in itertools.islice(pieces, sent, None):
                with self._sent(number, piece, torch.empty(piece.num_bytes, dtype=torch.uint8)):
                    pass
        except RuntimeError as error:  # the other worker is gone
            self.failure = self.failure or error

    def _receive(self, sender: int) -> None:
        """What another worker sends; written as its own is, if nothing has failed."""
        descriptors: dict[int, int] = {}
        try:
            for arrival in self._routes.arrivals[sender]:
                buffer = torch.empty(arrival.num_bytes, dtype=torch.uint8)
                receive(self._disks, buffer, sender, PIECES)
                if self.failure is None:
                    self._write_arrival(descriptors, arrival, buffer)
            for descriptor in descriptors.values():
                os.fsync(descriptor)
        except Exception as error:
            self.failure = self.failure or error
            self._room.close()
        finally:
            for descriptor in descriptors.values():
                with contextlib.suppress(OSError):
                    os.close(descriptor)
            self._one_has_written()

    def _write_arrival(self, descriptors: dict[int, int], arrival: Arrival, buffer: Tensor) -> None:
        try:
            if arrival.file not in descriptors:
                path = self._jobs[arrival.file][0]
                path.parent.mkdir(parents=True, exist_ok=True)
                descriptors[arrival.file] = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            _write_all(descriptors[arrival.file], buffer.numpy().data, arrival.offset)
            self.num_written += arrival.num_bytes
        except OSError as error:
            self.failure = self.failure or error
            self._room.close()

    def _one_has_written(self) -> None:
        """Of the threads that write; after the last one, all is there, or has failed."""
        if next(self._still_writing) == 0:
            self.written.set()

    def _open(self, path: Path, file: TensorFile, layout: FileLayout) -> int:
        """The file, which another worker may have begun; the first worker of a disk writes what is no tensor."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if self._disks.is_first:
            _write_all(descriptor, memoryview(layout.header), 0)
            for name, text in file.beside.items():
                (path.parent / name).write_text(text, encoding="utf-8")
        return descriptor


@torch.no_grad()
def _fill(buffer: Tensor, piece: Piece) -> None:
    buffer.view(piece.held.dtype).copy_(piece.elements(), non_blocking=True)


def _buffer(num_bytes: int, *, pinned: bool) -> Tensor:
    """Memory for a piece: pinned for a card; else from the system, to which it goes back whole."""
    if pinned or num_bytes < _SMALL_BYTES:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    # Pages of Python's default mapping are shared ones, which take twice as long at their first touch; and training
    # waits for that.
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _fail_if_planned(rank: int, step: int) -> None:
    """As a disk does that is full, or gone."""
    for kind, number in (("disk_full", errno.ENOSPC), ("disk_gone", errno.EIO)):
        if planned(kind, rank, step) is not None:
            raise OSError(number, os.strerror(number))


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(descriptor, data[done:], offset + done)


def _require_finite(file: str, piece: Piece, content: Tensor) -> None:
    """NotFinite if there is a NaN or an infinity in it; a sum finds either, and may overflow without."""
    dtype = piece.held.dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:
        return
    values = content.view(dtype)
    if not torch.isfinite(values.sum(dtype=torch.float32)) and not bool(torch.isfinite(values).all()):
        raise NotFinite(f"{file}: {piece.name} holds NaN or infinity")

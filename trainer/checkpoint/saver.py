"""Writes folders of tensors beside the training, each worker its own share, without an exchange that others wait in.

A save runs through these phases on every worker alike:

    copying, writing   two threads: one copies what changes with the next update, in pieces of bounded size; the
                       other, as soon as all is copied or there is no room for more, checks that it is finite, writes
                       it to its place in the files, and flushes them. The loop goes on at once, and waits for the
                       copies only before weights change: at the next update.
    publishing         when all have written: a thread of rank 0 reads the files back for the manifest, flushes, renames

Workers tell each other whether they are busy or have failed in the sums that a training step exchanges anyhow. So a
disk that is gone is noticed by all of them, and a slow one delays nothing but the next save.
"""

import contextlib
import errno
import logging
import mmap
import os
import queue
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from trainer.checkpoint.pieces import FileLayout, Piece, bytes_of, lay_out
from trainer.checkpoint.write import TensorFile, publish_folder
from trainer.faults import planned

_log = logging.getLogger(__name__)
_SMALL_BYTES = 64 << 10

Phase = Literal["idle", "writing", "publishing"]
FLAGS = 3
"""Numbers that `Saver.flags` gives."""
Exchange = Callable[[list[float]], list[float]]
"""Sums over all workers."""


class NotFinite(Exception):
    """A tensor that was to be saved holds NaN or infinity; the message names it."""


@dataclass(frozen=True)
class Folder:
    """What is saved.

    Attributes:
        path: its name when it is whole; must not exist.
        state: JSON-able; the first worker's is written.
        published: called after that, by a thread of the first worker.
    """

    path: Path
    files: Sequence[TensorFile]
    state: Mapping[str, object]
    published: Callable[[], None] = lambda: None


class Saver:
    """One save at a time; see above. `begin`, then in each step `flags` and `after_exchange`; or `finish`, to wait."""

    def __init__(self, rank: int, world: int, token: str, device: torch.device, staging_bytes: int | None) -> None:
        """
        Args:
            token: the same on all workers, and no other start's.
            device: where the tensors are.
            staging_bytes: of the copies that this worker holds at most; None: all that it writes.
        """
        self._rank, self._world, self._token, self._device = rank, world, token, device
        self._staging_bytes = staging_bytes
        self._count = 0
        self.phase: Phase = "idle"
        self.folders: Sequence[Folder] = ()
        """Of the save that is under way, or was the last."""
        self._work: _Work | None = None
        self._publishing: threading.Thread | None = None
        self._reason: Exception | None = None

    def begin(self, folders: Sequence[Folder], step: int = 0) -> None:
        """Start saving after `step` steps; what is copied must not change until `wait_copied` has returned.

        All workers call it with the same folders, in phase "idle".
        """
        assert self.phase == "idle"
        self._count += 1
        self._reason = None
        self.folders, self.phase = folders, "writing"
        places = [self._temporary(folder) for folder in folders]
        files = [(place / f.name, f) for place, folder in zip(places, folders, strict=True) for f in folder.files]
        self._work = _Work(self._rank, self._world, self._device, files, self._staging_bytes, step)

    def _temporary(self, folder: Folder) -> Path:
        return folder.path.with_name(f"{folder.path.name}.{self._token}-{self._count}.tmp")

    def wait_copied(self) -> None:
        """Until weights may change."""
        if self._work is not None:
            self._work.copied.wait()

    def flags(self) -> list[float]:
        """Busy, failed, and failed because a tensor is not finite: to be summed over all workers."""
        if self.phase == "idle":
            return [0.0] * FLAGS
        writing = self._work is not None and not self._work.written.is_set()
        publishing = self._publishing is not None and self._publishing.is_alive()
        failure = self._failure()
        return [float(writing or publishing), float(failure is not None), float(isinstance(failure, NotFinite))]

    def _failure(self) -> Exception | None:
        return self._reason or (self._work.failure if self._work is not None else None)

    def after_exchange(self, busy: float, failed: float, not_finite: float) -> Exception | None:
        """Go on to the next phase, as all workers do at the same time.

        Args:
            busy, failed, not_finite: sums of `flags`.

        Returns:
            Why the save was given up, if it was: this worker's reason, or that it was another's; of the same kind, a
            `NotFinite` or not, on all workers. Nothing is left of it.
        """
        if self.phase == "idle" or busy:
            return None
        if failed:
            reason = self._failure()
            if not_finite and not isinstance(reason, NotFinite):
                reason = NotFinite("a worker holds NaN or infinity; its log says where")
            reason = reason or OSError(errno.EIO, "another worker could not write its share; its log says why")
            if self._rank == 0:
                for folder in self.folders:
                    shutil.rmtree(self._temporary(folder), ignore_errors=True)
            self._end()
            return reason
        if self.phase == "writing":
            self.phase, self._work = "publishing", None
            if self._rank == 0:
                self._publishing = threading.Thread(target=self._publish, name="publish", daemon=True)
                self._publishing.start()
        else:
            self._end()
        return None

    def _end(self) -> None:
        self.phase, self._work, self._publishing = "idle", None, None

    def _publish(self) -> None:
        try:
            for folder in self.folders:
                publish_folder(self._temporary(folder), folder.path, folder.state)
        except Exception as error:
            self._reason = error
            return
        try:
            for folder in self.folders:
                folder.published()
        except OSError as error:  # what is saved is saved
            _log.warning("%s: %s", self.folders[0].path.parent, error)

    def finish(self, exchange: Exchange) -> Exception | None:
        """Wait until the save under way is published or given up; all workers call it. Returns as `after_exchange`."""
        while self.phase != "idle":
            if self._work is not None:
                self._work.written.wait()
            if self._publishing is not None:
                self._publishing.join()
            if (reason := self.after_exchange(*exchange(self.flags()))) is not None:
                return reason
        return None


def save_now(folder: Folder, device: torch.device | None = None) -> None:
    """Save from one process that has everything, and wait.

    Raises:
        OSError: the disk is full or gone; what was there before is untouched.
        NotFinite: see there.
    """
    saver = Saver(0, 1, str(os.getpid()), device or torch.device("cpu"), staging_bytes=None)
    saver.begin([folder])
    if (reason := saver.finish(list)) is not None:
        raise reason


class _Room:
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


class _Work:
    """A worker's two threads and what they share."""

    def __init__(
        self,
        rank: int,
        world: int,
        device: torch.device,
        files: Sequence[tuple[Path, TensorFile]],
        staging_bytes: int | None,
        step: int,
    ) -> None:
        """Start them. `files`: each with the place where it is written."""
        self._rank, self._step, self._device, self._begins_files = rank, step, device, rank == 0
        self._jobs = [(place, file, lay_out(file, rank, world)) for place, file in files]
        mine = bytes_of([layout for _, _, layout in self._jobs])
        self._room = _Room(mine if staging_bytes is None else min(mine, staging_bytes))
        self._full: queue.Queue[tuple[int, Piece, Tensor] | None] = queue.Queue()
        self.copied, self.written = threading.Event(), threading.Event()
        self.failure: Exception | None = None
        ready = None
        if device.type == "cuda":
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(device))
        threading.Thread(target=self._copy, args=(ready,), name="save: copy", daemon=True).start()
        threading.Thread(target=self._write, name="save: write", daemon=True).start()

    def _copy(self, ready: "torch.cuda.Event | None") -> None:
        try:
            # On a card, on a stream of its own, so that only the copies are waited for.
            stream = torch.cuda.Stream(self._device) if ready is not None else None
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
        try:
            if self._begins_files:
                self._require_space()
            for path, file, layout in self._jobs:
                descriptors.append(self._open(path, file, layout))
            # Training waits for the copies and for nothing else: what writes would take memory's and the host's time.
            self._room.wanted.wait()
            while (job := self._full.get()) is not None:
                number, piece, buffer = job
                _fail_if_planned(self._rank, self._step)
                _require_finite(self._jobs[number][1].name, piece, buffer)
                _write_all(descriptors[number], buffer.numpy().data, piece.offset)
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
            self.written.set()

    def _require_space(self) -> None:
        """At once, and not when the disk is full: other files of the run want to be written too."""
        needed = sum(layout.num_bytes for _, _, layout in self._jobs)
        folder = next(parent for parent in self._jobs[0][0].parents if parent.exists())
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise OSError(errno.ENOSPC, f"needs {needed:,} bytes, {free:,} are free", str(folder))

    def _open(self, path: Path, file: TensorFile, layout: FileLayout) -> int:
        """The file, which another worker may have begun; the first worker writes what is no tensor."""
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if self._begins_files:
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

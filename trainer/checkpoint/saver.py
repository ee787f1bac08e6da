"""Writes folders of tensors beside the training, each worker its own share, without an exchange that others wait in.

A save runs through these phases on every worker alike:

    copying, writing   two threads: one copies what changes with the next update, in pieces of bounded size; the
                       other, as soon as all is copied or there is no room for more, checks that it is finite, writes
                       it to its place in the files, and flushes them. The loop goes on at once, and waits for the
                       copies only before weights change: at the next update.
    publishing         when all have written: a thread of rank 0, or on each host's own disk of one worker there, reads
                       the files back for the manifest, flushes, renames

Workers tell each other whether they are busy or have failed in the sums that a training step exchanges anyhow. So a
disk that is gone is noticed by all of them, and a slow one delays nothing but the next save.
"""

import errno
import logging
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from trainer.checkpoint.pieces import size_of
from trainer.checkpoint.share_of_save import NotFinite, ShareOfSave
from trainer.checkpoint.write import TensorFile, publish_folder
from trainer.disks.run_disks import Disks, one_disk
from trainer.parallel.comm import Comm, broadcast_object

_log = logging.getLogger(__name__)
_LOOK_S, _EXCHANGE_EVERY_S = 5.0, 30.0

Phase = Literal["idle", "writing", "publishing"]
FLAGS = 3
"""Numbers that `Saver.flags` gives."""
Exchange = Callable[[list[float]], list[float]]
"""Sums over all workers."""
Alive = Callable[[], None]


@dataclass(frozen=True)
class Folder:
    """What is saved.

    Attributes:
        path: its name when it is whole; must not exist.
        state: JSON-able; the first worker's is written.
        published: called after that, by a thread of the first worker of each disk.
    """

    path: Path
    files: Sequence[TensorFile]
    state: Mapping[str, object]
    published: Callable[[], None] = lambda: None


class Saver:
    """One save at a time; see above. `begin`, then in each step `flags` and `after_exchange`; or `finish`, to wait."""

    def __init__(
        self,
        rank: int,
        world: int,
        token: str,
        device: torch.device,
        staging_bytes: int | None,
        disks: Disks | None = None,
    ) -> None:
        """
        Args:
            token: the same on all workers, and no other start's.
            device: where the tensors are.
            staging_bytes: of the copies that this worker holds at most; None: all that it writes.
            disks: None: all workers write to one.
        """
        self._disks = disks or one_disk(Comm(rank, world, rank, device))
        self._token, self._device = token, device
        self._staging_bytes = staging_bytes
        self._count = 0
        self.phase: Phase = "idle"
        self.folders: Sequence[Folder] = ()
        """Of the save that is under way, or was the last."""
        self._work: ShareOfSave | None = None
        self._publishing: threading.Thread | None = None
        self._published = threading.Event()
        self._read_back = 0
        self._reason: Exception | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin(self, folders: Sequence[Folder], step: int = 0, no_room: str = "") -> None:
        """Start saving after `step` steps; what is copied must not change until `wait_copied` has returned.

        All workers call it with the same folders, in phase "idle".

        Args:
            no_room: by `missing_room`, asked by one of them; nothing is written then, and the save fails.
        """
        assert self.phase == "idle"
        self._count += 1
        self._reason = OSError(errno.ENOSPC, no_room) if no_room else None
        self.folders, self.phase = folders, "writing"
        if no_room:
            return
        if self._disks.count > 1:  # of which each gets the same
            states = broadcast_object(self._disks.comm, [folder.state for folder in folders])
            self.folders = [replace(folder, state=state) for folder, state in zip(folders, states, strict=True)]
        places = [self._temporary(folder) for folder in folders]
        files = [(place / f.name, f) for place, folder in zip(places, folders, strict=True) for f in folder.files]
        self._work = ShareOfSave(self._disks, self._device, self._stream, files, self._staging_bytes, step)

    def _temporary(self, folder: Folder) -> Path:
        return folder.path.with_name(f"{folder.path.name}.{self._token}-{self._count}.tmp")

    def wait_copied(self, alive: Alive = lambda: None) -> None:
        """Until weights may change; `alive` is called every few seconds in which bytes have reached the disk."""
        if self._work is not None:
            self._await(self._work.copied, alive)

    def _await(self, event: threading.Event, alive: Alive, most_s: float = math.inf) -> None:
        """Until the event, or for `most_s`."""
        end, before = time.monotonic() + most_s, self._progress()
        while not event.wait(min(_LOOK_S, max(0.0, end - time.monotonic()))) and time.monotonic() < end:
            if (now := self._progress()) != before:
                before = now
                alive()

    def _progress(self) -> int:
        """Bytes that were written, or read back."""
        return self._read_back + (self._work.num_written if self._work is not None else 0)

    def flags(self) -> list[float]:
        """Busy, failed, and failed because a tensor is not finite: to be summed over all workers."""
        if self.phase == "idle":
            return [0.0] * FLAGS
        writing = self._work is not None and not self._work.written.is_set()
        publishing = self._publishing is not None and not self._published.is_set()
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
            if self._disks.is_first:
                for folder in self.folders:
                    shutil.rmtree(self._temporary(folder), ignore_errors=True)
            self._end()
            return reason
        if self.phase == "writing":
            self.phase, self._work = "publishing", None
            if self._disks.is_first:
                self._published.clear()
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
                publish_folder(self._temporary(folder), folder.path, folder.state, self._note_read_back)
        except Exception as error:
            self._reason = error
        else:
            for folder in self.folders:
                _tell_published(folder)
        finally:
            self._published.set()

    def _note_read_back(self, num_bytes: int) -> None:
        self._read_back += num_bytes

    def finish(self, exchange: Exchange, alive: Alive = lambda: None) -> Exception | None:
        """Wait until the save under way is published or given up; all workers call it. Returns as `after_exchange`.

        Args:
            alive: as in `wait_copied`. No worker waits in an exchange for longer than another one looks at its disk.
        """
        while self.phase != "idle":
            if self._work is not None:
                self._await(self._work.written, alive, _EXCHANGE_EVERY_S)
            if self._publishing is not None:
                self._await(self._published, alive, _EXCHANGE_EVERY_S)
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


def missing_room(folders: Sequence[Folder]) -> str:
    """In words, if the disk cannot take them, or is gone.

    Asked before, for other files of the run want to be written too.
    """
    needed = sum(size_of(file) for folder in folders for file in folder.files)
    try:
        there = next(parent for parent in folders[0].path.parents if parent.exists())
        free = shutil.disk_usage(there).free
    except OSError as error:  # raised by one worker, it would end the run; so it is a save that fails
        return f"{error.filename}: {error.strerror}"
    return f"needs {needed:,} bytes, {free:,} are free" if needed > free else ""


def _tell_published(folder: Folder) -> None:
    try:
        folder.published()
    except OSError as error:  # what is saved is saved
        _log.warning("%s: %s", folder.path.parent, error)

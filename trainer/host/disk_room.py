"""Room on the disk for checkpoints, before a run and during it; and in /dev/shm."""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError

_SPARE = 0.5  # of a checkpoint: logs, samples, and what is written beside it
_SHM = Path("/dev/shm")
_SHM_PER_WORKER = 64 << 20  # NCCL: 4 MiB for each channel and neighbour
_CLEARLY_MORE = 1.25


def free_bytes(folder: Path) -> int:
    """What this user may still write on the disk of a folder that may not be there yet.

    Raises:
        OSError: the disk does not answer.
    """
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def folder_bytes(folder: Path) -> int:
    """The sizes of all files of a folder; 0 if it is not there."""
    return sum(Path(base, name).stat().st_size for base, _, names in os.walk(folder) for name in names)


def require_room(places: Sequence[Path], checkpoint_bytes: int, held: int, keep: int, to_write: int) -> None:
    """Refuse a run whose disk cannot hold the checkpoints that it keeps.

    A new one is written before the oldest is deleted.

    Args:
        places: the run's directory, and where checkpoints go if that is full; one with room suffices.
        checkpoint_bytes: of one checkpoint.
        held: checkpoints of this run that are there already.
        keep: how many of the newest stay.
        to_write: checkpoints until the run's end, at most.

    Raises:
        UserError: it does not suffice.
    """
    if not to_write:
        return
    new = min(to_write, keep + 1 - min(held, keep))
    needed, free = int((new + _SPARE) * checkpoint_bytes), max(free_bytes(place) for place in places)
    if free >= needed:
        return
    size = told_bytes(checkpoint_bytes)
    what = f"{new} more checkpoints of {size} each, and a little more," if new > 1 else f"a checkpoint of {size}"
    raise UserError(
        f"run.dir ({places[0]}): its disk has {told_bytes(free)} free, and {what} need {told_bytes(needed)}: "
        "make room, lower checkpoint.keep (at least 2), or choose another place"
    )


@dataclass
class DiskAlarm:
    """Told once when the room falls below the next checkpoint's size, and again only after it was clearly larger."""

    folder: Path
    is_on: bool = False

    def add(self, free: int, next_checkpoint: int) -> str | None:
        """Take a reading; returns what to tell, or None."""
        if self.is_on:
            self.is_on = free < _CLEARLY_MORE * next_checkpoint
            return None
        self.is_on = free < next_checkpoint
        if not self.is_on:
            return None
        needed = told_bytes(next_checkpoint)
        return f"{self.folder}: {told_bytes(free)} free, less than the next checkpoint takes ({needed})"


def shared_memory_warning(workers: int, folder: Path = _SHM) -> str | None:
    """That /dev/shm is too small for workers on cards, which exchange gradients through it; None where it suffices.

    Reader processes use none of it.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return None
    needed = workers * _SHM_PER_WORKER
    if workers < 2 or free >= needed:
        return None
    return (
        f"{folder} has {told_bytes(free)} free, and {workers} workers on cards may need {told_bytes(needed)} of it; "
        "in a container, give it more (docker run --shm-size=2g)"
    )


def told_bytes(count: float) -> str:
    """A size for a person."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1000:.0f} kB"

"""What each worker does at the moment and since when, in a few bytes of shared memory; and who has stopped moving.

A worker writes one record where it goes from one part of its work to the next, with the time that this part may take:
five times the longest that it took before. The parent only reads. No socket, no lock: a worker that hangs cannot hide
it. Standard library only.
"""

import mmap
import os
import struct
import time
from collections import defaultdict, deque
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

_RECORD = struct.Struct("<qqdd16s")
_LATEST = 200  # durations of each part that are looked back on
_FEW = 3
_TIMES = 5.0


class Beat(NamedTuple):
    """A worker's record.

    Attributes:
        step: steps of the run that are done; `taken`: of these, since the worker was started.
        since_s: `time.monotonic()` when the part began.
        allowed_s: how long it may take.
        part: of the work, such as "step".
    """

    step: int
    taken: int
    since_s: float
    allowed_s: float
    part: str


class Heartbeat:
    """A worker's side."""

    def __init__(self, path: Path | None, hang_after_s: float, at_first_s: float) -> None:
        """`path`: None where nobody looks. A part of which few durations are known may take `at_first_s`."""
        self._hang_after_s, self._at_first_s = hang_after_s, at_first_s
        self._durations: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_LATEST))
        self._part, self._since_s, self._first_step = "", 0.0, -1
        self._memory: mmap.mmap | None = None
        if path is not None:
            with path.open("w+b") as file:
                file.truncate(_RECORD.size)
                self._memory = mmap.mmap(file.fileno(), _RECORD.size)

    def begin(self, part: str, step: int) -> None:
        """From now on this part, of at most 16 letters, after so many steps of the run."""
        now = time.monotonic()
        if self._first_step < 0:
            self._first_step = step
        if self._part:
            self._durations[self._part].append(now - self._since_s)
        known = self._durations[part]
        allowed_s = max(self._hang_after_s, _TIMES * max(known)) if len(known) >= _FEW else self._at_first_s
        self._part, self._since_s = part, now
        if self._memory is not None:
            self._memory[:] = _RECORD.pack(step, step - self._first_step, now, allowed_s, part.encode())

    def rest(self) -> None:
        """Nothing more is promised."""
        if self._memory is not None:
            self._memory[:] = bytes(_RECORD.size)


def beat_path(log_dir: Path, rank: int) -> Path:
    """Where worker `rank` writes."""
    return log_dir / f"rank-{rank}.beat"


def read_beat(log_dir: Path, rank: int) -> Beat | None:
    """A worker's record; None where there is none."""
    try:
        data = beat_path(log_dir, rank).read_bytes()
    except OSError:
        return None
    if len(data) != _RECORD.size:
        return None
    step, taken, since_s, allowed_s, part = _RECORD.unpack(data)
    return Beat(step, taken, since_s, allowed_s, part.rstrip(b"\0").decode(errors="replace")) if since_s else None


def find_late(log_dir: Path, ranks: Collection[int]) -> tuple[int, Beat] | None:
    """The worker that has stopped moving, if one is late: of several, for the others wait, the one that moved least."""
    now = time.monotonic()
    beats = [(rank, beat) for rank in ranks if (beat := read_beat(log_dir, rank))]
    if not any(now > beat.since_s + beat.allowed_s for _, beat in beats):
        return None
    return min(beats, key=lambda pair: (pair[1].step, pair[1].since_s))


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return False
    return state in ("T", "t")


def heartbeat_of_worker(log_dir_variable: str, hang_after_s: float, at_first_s: float) -> Heartbeat:
    """This worker's, where a parent looks; else one that nobody reads."""
    folder = os.environ.get(log_dir_variable)
    path = beat_path(Path(folder), int(os.environ.get("RANK", "0"))) if folder else None
    return Heartbeat(path, hang_after_s, at_first_s)

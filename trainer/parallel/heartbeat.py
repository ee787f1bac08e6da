"""What each worker does at the moment and since when, in a file of a few bytes; and who has stopped moving.

A worker writes one record where it goes from one part of its work to the next, with the time that this part may take:
five times the longest that it took before. The parent only reads. No socket, no lock: a worker that hangs cannot hide
it. Standard library only.

Who waits for a disk says so again and again, as long as bytes arrive there (`WRITING`); so do the others, who wait for
that worker in an exchange, not hang.
"""

import os
import struct
import time
from collections import defaultdict, deque
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_RECORD = struct.Struct("<qqdd16s")
_LATEST = 200  # durations of each part that are looked back on
_FEW = 3
_TIMES = 5.0
LOADING, WRITING = "loading", "writing"


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
        self._part, self._since_s, self._step, self._first_step = "", 0.0, 0, -1
        # Written by a call each time: a page of memory that stands for a file ends the process where the disk is full.
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644) if path else None

    @property
    def part(self) -> str:
        """What was begun last."""
        return self._part

    def begin(self, part: str, step: int | None = None) -> None:
        """From now on this part, of at most 16 letters, after so many steps of the run; None: as many as before."""
        now = time.monotonic()
        if step is not None:
            self._step = step
            if self._first_step < 0 and part != LOADING:
                self._first_step = step
        if self._part:
            self._durations[self._part].append(now - self._since_s)
        known = self._durations[part]
        allowed_s = max(self._hang_after_s, _TIMES * max(known)) if len(known) >= _FEW else self._at_first_s
        self._part, self._since_s = part, now
        taken = self._step - self._first_step if self._first_step >= 0 else 0
        self._put(_RECORD.pack(self._step, taken, now, allowed_s, part.encode()))

    def rest(self) -> None:
        """Nothing more is promised."""
        self._put(bytes(_RECORD.size))

    def _put(self, record: bytes) -> None:
        if self._file is not None:
            with suppress(OSError):  # the disk is full: training goes on, watched a little less
                os.pwrite(self._file, record, 0)


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
    """The worker that has stopped moving, if one is late: of several, for the others wait, the one that moved least.

    None is late while one writes that has not taken more steps, for then all wait for a disk.
    """
    now = time.monotonic()
    beats = [(rank, beat) for rank in ranks if (beat := read_beat(log_dir, rank))]
    late = [beat for _, beat in beats if now > beat.since_s + beat.allowed_s]
    writing = [beat.step for _, beat in beats if beat.part == WRITING and beat not in late]
    if not late or (writing and min(writing) <= min(beat.step for beat in late)):
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

"""How a worker's failure reaches the person: workers write one JSON file each, the parent shows the cause.

When one worker dies, its peers fail milliseconds later with network errors. The cause is the earliest failure
that is not such an echo.
"""

import errno
import json
import os
import shutil
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from trainer.errors import NumbersGoneWrong, OutOfMemory, UserError, WeightsDiffer

ECHO_WINDOW_S = 2.0
_ECHO_TYPES = frozenset({"DistBackendError", "DistNetworkError", "DistStoreError"})
_ECHO_TEXTS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "gloo/transport",
    "ncclremoteerror",
    "ncclsystemerror",
    "failed to recv, got 0 bytes",
)
# Of CUDA's allocator, its lazily loaded kernels, cuBLAS and cuDNN, and NCCL; none of them names one type of error.
_CARD_IS_FULL = ("cuda out of memory", "cuda error: out of memory", "failure 2 'out of memory'", "status_alloc_failed")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_LITTLE_SHM_BYTES = 16 << 20


@dataclass(frozen=True)
class Failure:
    """Why one worker ended.

    `kind`: `user` (a `UserError`; `text` is its lines), `memory` (`OutOfMemory`, or a full card; `text` says so in a
    line), `error` (any other exception; `text` is the traceback), `lost_peer` (an exception that only says that another
    worker is gone), `signal` and `exit` (the worker ended without a word; `text` says how), `hang` (it did not move any
    more; `text` says since when), `card` (its card is gone; `text` says so in a line), `numerics` (`NumbersGoneWrong`)
    and `corrupt` (`WeightsDiffer`; `text` says in a line what the next start does about it). `alone`: it is this worker
    that hangs, and the others wait for it. `monotonic_s` is `time.monotonic()`, which all processes of a host share.
    """

    rank: int
    kind: Literal["user", "memory", "error", "lost_peer", "signal", "exit", "hang", "card", "numerics", "corrupt"]
    monotonic_s: float
    text: str
    alone: bool = False

    @property
    def exit_code(self) -> int:
        """The command's exit code: 2 for a user's mistake, 1 for everything else."""
        return 2 if self.kind == "user" else 1

    @property
    def is_told(self) -> bool:
        """Whether `text` says all that a person has to know, in whole lines."""
        return self.kind in ("user", "memory", "card", "numerics", "corrupt")

    def message(self) -> str:
        """What the person reads."""
        if self.is_told:
            return self.text
        verb = "" if self.kind in ("signal", "exit", "hang") else "failed:\n"
        return f"worker {self.rank} {verb}{self.text}"


def failure_from(rank: int, error: BaseException) -> Failure:
    """The `Failure` that an exception of this worker amounts to, now."""
    if isinstance(error, UserError):
        return Failure(rank, "user", time.monotonic(), "\n".join(error.lines))
    if isinstance(error, OSError) and error.errno in _FULL:
        place = f"{error.filename}: " if error.filename else ""
        return Failure(rank, "user", time.monotonic(), f"{place}{error.strerror}; nothing can be written there")
    if isinstance(error, NumbersGoneWrong):
        return Failure(rank, "numerics", time.monotonic(), str(error))
    if isinstance(error, WeightsDiffer):  # all workers raise it; it is one of them that is at fault
        return Failure(rank, "corrupt" if rank == error.rank else "lost_peer", time.monotonic(), str(error))
    if isinstance(error, OutOfMemory):
        return Failure(rank, "memory", time.monotonic(), str(error))
    if card_is_full(error):
        line = str(error).strip().splitlines()[0]
        return Failure(rank, "memory", time.monotonic(), f"worker {rank} ran out of its card's memory: {line}")
    text = "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
    return Failure(rank, "lost_peer" if _is_echo(error) else "error", time.monotonic(), text)


def card_is_full(error: BaseException) -> bool:
    """Whether an error, or what led to it, says that a card's memory did not suffice."""
    return any(text in str(link).lower() for link in _chain(error) for text in _CARD_IS_FULL)


def _is_echo(error: BaseException) -> bool:
    return any(
        type(link).__name__ in _ECHO_TYPES or any(text in str(link).lower() for text in _ECHO_TEXTS)
        for link in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def failure_path(log_dir: Path, rank: int) -> Path:
    """Where worker `rank` records its failure."""
    return log_dir / f"rank-{rank}.error.json"


def record_failure(log_dir: Path, failure: Failure) -> None:
    """Write this worker's failure for the parent to read; the file appears complete or not at all."""
    path = failure_path(log_dir, failure.rank)
    record = asdict(failure) | {"time": time.time(), "pid": os.getpid()}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record), encoding="utf-8")
    temporary.replace(path)


def read_failure(log_dir: Path, rank: int) -> Failure | None:
    """What worker `rank` has recorded, or None."""
    path = failure_path(log_dir, rank)
    if not path.exists():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    return Failure(record["rank"], record["kind"], record["monotonic_s"], record["text"])


def oom_kills() -> int | None:
    """How many processes the kernel has ended since it started, for want of memory; None where it does not tell."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _checked_cause(number: int, oom_kills_before: int | None) -> str:
    """What is behind a signal, as far as this host can tell; no guesses."""
    if number == signal.SIGKILL:
        now = oom_kills()
        if now is None or oom_kills_before is None:
            return "exit 137"
        if now > oom_kills_before:
            return "exit 137: the kernel has ended a process for want of host memory since the workers started"
        return "exit 137: somebody else's doing, for the kernel has ended no process for want of memory"
    if number == signal.SIGBUS and shutil.disk_usage("/dev/shm").free < _LITTLE_SHM_BYTES:
        return "/dev/shm is full"
    return ""


def silent_failure(rank: int, return_code: int, log_tail: str, oom_kills_before: int | None = None) -> Failure:
    """The failure of a worker that ended without a record.

    Args:
        return_code: as `subprocess` gives it (-9 = SIGKILL).
        oom_kills_before: `oom_kills` when the workers were started.
    """
    if return_code < 0:
        number = -return_code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        cause = _checked_cause(number, oom_kills_before)
        kind, text = "signal", f"was ended by {name}" + (f" ({cause})" if cause else "")
    elif return_code == 2:  # a user's mistake, or a full disk, on which nothing could be recorded
        kind, text = "user", f"worker {rank} has said above why it ended"
    else:
        kind, text = "exit", f"ended with exit code {return_code}"
    return Failure(rank, kind, time.monotonic(), f"{text}; the end of its log:\n{log_tail}" if log_tail else text)


def first_cause(failures: Sequence[Failure]) -> Failure | None:
    """The earliest failure; an echo of a peer's death gives way to a cause seen up to `ECHO_WINDOW_S` after it."""
    if not failures:
        return None
    earliest = min(failures, key=lambda failure: failure.monotonic_s)
    limit = earliest.monotonic_s + ECHO_WINDOW_S
    causes = [f for f in failures if f.kind != "lost_peer" and f.monotonic_s <= limit]
    return min(causes, key=lambda failure: failure.monotonic_s, default=earliest)

"""The worker's side of a launch: end with the parent, stop when asked, and say why it failed. No torch."""

import atexit
import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

from trainer.errors import printable_lines
from trainer.parallel.failure import failure_from, record_failure

# The launching process tells its workers these; absent under torchrun and SLURM.
PARENT_PID = "SDXL_TRAIN_PARENT_PID"
LOG_DIR = "SDXL_TRAIN_LOG_DIR"
ATTEMPT = "SDXL_TRAIN_ATTEMPT"
DEVICE = "SDXL_TRAIN_DEVICE"
CORES = "SDXL_TRAIN_CORES"
STORE_PORT = "SDXL_TRAIN_STORE_PORT"
STORE_FD = "SDXL_TRAIN_STORE_FD"
# How many times the workers were started again because what was planned did not fit.
MEMORY_ATTEMPT = "SDXL_TRAIN_MEMORY_ATTEMPT"

# How many times the workers were started again after a fault.
RESTARTS = "SDXL_TRAIN_RESTARTS"
# A folder in which workers of torchrun or SLURM say how they ended, for scripts that start them again.
ENDINGS = "SDXL_TRAIN_ENDINGS"
DUMP_SIGNAL = signal.SIGUSR1

_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


def run_worker(body: Callable[[Callable[[], bool]], None]) -> None:
    """Run a worker's whole work; on failure, tell the parent (or the terminal) why and end the process.

    Args:
        body: gets `stop_requested`, to be asked between steps; when it says yes, save and return. Import torch
            inside, not before.
    """
    if PARENT_PID in os.environ:
        die_with(int(os.environ[PARENT_PID]))
    if STORE_FD in os.environ:
        os.set_inheritable(int(os.environ[STORE_FD]), False)
    _take_name()
    _stay_on_cores()
    faulthandler.enable()
    _dump_stacks_when_asked()
    stop_requested = _stop_on_signals()
    try:
        body(stop_requested)
    except Exception as error:
        exit_code = _report(error)
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        # No interpreter teardown: it would wait for loader processes and for peers that may be gone.
        os._exit(exit_code)
    if stop_requested():
        note_ending("stopped")
    end_process()


def note_ending(word: Literal["refused", "stopped"]) -> None:
    """Tell the script that has started this process, if it asked, why it ends: torchrun and srun lose exit codes.

    `refused`: another start would end alike, for it is a user's mistake; `stopped`: a signal asked for it.
    """
    if folder := os.environ.get(ENDINGS):
        with contextlib.suppress(OSError):
            (Path(folder) / word).touch()


def be_its_reader_server() -> None:
    """For a fork of a worker from which the processes come that read for it."""
    if STORE_FD in os.environ:
        os.close(int(os.environ[STORE_FD]))  # the workers' meeting point ends with rank 0
    set_process_attribute(_PR_SET_NAME, b"sdxl-readers")


def end_process() -> NoReturn:
    """End this process, whose work is done, without the interpreter's teardown; for whoever was in a process group.

    The teardown aborted up to one of ten of them ("terminate called without an active exception"): most likely, a
    thread of gloo that lets go of a tensor wants the interpreter's lock, is ended instead, and takes the process along.
    """
    atexit._run_exitfuncs()  # closes logs, removes multiprocessing's temporary folder
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _report(error: Exception) -> int:
    """Record or print the failure; returns this process's exit code."""
    rank = int(os.environ.get("RANK", "0"))
    failure = failure_from(rank, error)
    recorded = False
    if failure.kind == "user":
        note_ending("refused")
    if LOG_DIR in os.environ:
        with contextlib.suppress(OSError):  # a full disk may be what failed
            record_failure(Path(os.environ[LOG_DIR]), failure)
            recorded = True
    # The parent prints what was recorded, so rank 0, which shares its terminal, stays silent.
    if failure.message() and (rank != 0 or not recorded):
        with contextlib.suppress(OSError):
            print(printable_lines(failure.message()), file=sys.stderr)
    return failure.exit_code


def stacks_path(log_dir: Path, rank: int) -> Path:
    """Where worker `rank` writes down where its threads are."""
    return log_dir / f"rank-{rank}.stacks.txt"


def _dump_stacks_when_asked() -> None:
    """On `DUMP_SIGNAL`, write where every thread is to a file beside the log."""
    if LOG_DIR not in os.environ:
        return
    path = stacks_path(Path(os.environ[LOG_DIR]), int(os.environ.get("RANK", "0")))
    with contextlib.suppress(OSError):
        # Kept open: the handler has no time to open it.
        faulthandler.register(DUMP_SIGNAL, file=path.open("a"), all_threads=True)


def _stop_on_signals() -> Callable[[], bool]:
    """A function that says whether SIGTERM or SIGINT has come; it takes charge of both when first asked.

    Until then they end this process at once: it has nothing to save yet, and may be waiting in a library.
    """
    stop = armed = False

    def request_stop(number: int, frame: FrameType | None) -> None:
        nonlocal stop
        stop = True

    def stop_requested() -> bool:
        nonlocal armed
        if not armed:
            armed = True
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, request_stop)
        return stop

    return stop_requested


def _stay_on_cores() -> None:
    """On the CPUs that the parent chose; threads and readers that start later inherit them."""
    if chosen := os.environ.get(CORES):
        with contextlib.suppress(OSError):  # a container may have been given fewer meanwhile
            os.sched_setaffinity(0, {int(cpu) for cpu in chosen.split(",")})


def _take_name() -> None:
    """In `top` and `ps -o comm`."""
    if PARENT_PID in os.environ:
        set_process_attribute(_PR_SET_NAME, process_name(int(os.environ["RANK"])).encode())


def process_name(rank: int) -> str:
    """What the kernel calls worker `rank` of a launch."""
    return f"sdxl-train-{rank}"


def die_with(parent: int) -> None:
    """Have the kernel kill this process when `parent`, which launched it, ends."""
    set_process_attribute(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # The parent may have ended before the line above.
    if os.getppid() != parent:
        os._exit(1)


def set_process_attribute(option: int, value: int | bytes) -> None:
    """prctl(2) of this process; nothing on other systems than Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)

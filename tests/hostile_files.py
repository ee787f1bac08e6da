"""Files that somebody made to crash, stall, fill or take over the program: kinds, a seeded maker, and a judge.

A kind is a function with the decorator `kind`; modules `tests/hostile_*.py` hold them. `judge_files` makes and tries
many in this process, which the tests start for it: importing the program costs more than all of them.
"""

import contextlib
import importlib
import io
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

_IMPORTED_BEFORE = ("trainer.cli.arguments", "trainer.cli.commands.inspect", "trainer.cli.commands.plan")
CANARY = "ran"  # in a file's folder: what code in it would make, if it were run
_HANG_S = 120  # of wall time, on a machine with other work
_STEERS = "\x1b\x07\x08\x7f\x9b\u202e\u2066\u2028"


@dataclass(frozen=True)
class Hostile:
    """One file.

    Attributes:
        path: the file, or the folder that it is part of.
        argv: the proper command of the program for it; or
        call: what the program does with it. It may return, or raise a UserError.
        may_pass: whether the file may also be found sound; of commands, whether the exit code may be 0.
    """

    path: Path
    argv: tuple[str, ...] = ()
    call: Callable[[], object] | None = None
    may_pass: bool = False


class Hangs(BaseException):
    """No TimeoutError, which is an OSError and would pass as one of the file's."""


@dataclass(frozen=True)
class Verdict:
    """What became of one file."""

    kind: str
    seed: int
    fault: str
    """Empty, or what should not have happened."""
    said: str
    """The first line that the program said."""
    cpu_s: float
    rss_mb: float
    """Memory that was in use at most, beyond what was before."""


Maker = Callable[[Random, int, Path], Hostile]
KINDS: dict[str, Maker] = {}


def kind(name: str) -> Callable[[Maker], Maker]:
    """Registers a maker of hostile files: (random numbers, the seed to choose a variant by, an empty folder)."""

    def register(maker: Maker) -> Maker:
        assert name not in KINDS, name
        KINDS[name] = maker
        return maker

    return register


def make(name: str, seed: int, folder: Path) -> Hostile:
    """One file of a kind; the same for the same seed. `HOSTILE_MODEL` in the environment names a sound model folder."""
    folder.mkdir(parents=True)
    return KINDS[name](Random(f"{name} {seed}"), seed, folder)


def load_kinds() -> None:
    """Imports every module of kinds."""
    for file in sorted(Path(__file__).parent.glob("hostile_*.py")):
        if file.stem != "hostile_files":
            importlib.import_module(f"tests.{file.stem}")


def judge(name: str, seed: int, folder: Path) -> Verdict:
    """Makes one file and lets the program at it."""
    file = make(name, seed, folder)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory counts from here
    before, started = _memory_mb("VmRSS"), _cpu_s()
    shown = io.StringIO()
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(_HANG_S)
    try:
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            fault = _outcome(file)
    finally:
        signal.alarm(0)
    said = shown.getvalue()
    if any(character in said for character in _STEERS):
        fault = fault or "what steers a terminal was printed"
    if (folder / CANARY).exists():
        fault = "code was run"
    first = said.strip().partition("\n")[0]
    return Verdict(name, seed, fault, first[:300], _cpu_s() - started, max(_memory_mb("VmHWM") - before, 0.0))


def _outcome(file: Hostile) -> str:
    from trainer.cli.main import main
    from trainer.errors import UserError

    try:
        if file.call is None:
            code = main(file.argv)
            allowed = (0, 2) if file.may_pass else (2,)
            return "" if code in allowed else f"exit code {code}"
        try:
            file.call()
        except UserError as error:
            print(*error.lines, sep="\n")
            return ""
        return "" if file.may_pass else "was taken for sound"
    except SystemExit as error:
        return f"exit {error.code}"
    except BaseException as error:
        return f"{type(error).__name__}: {error} in {traceback.format_exc()[-600:]}"


def _hangs(*_: object) -> None:
    raise Hangs(f"still at it after {_HANG_S} s")


def _cpu_s() -> float:
    return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])


def _memory_mb(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise AssertionError(name)


def judge_files(folder: Path, files: list[tuple[str, int]], result: Path) -> None:
    """Judges all of (kind, seed) and writes the verdicts as JSON lines."""
    load_kinds()
    for module in _IMPORTED_BEFORE:
        importlib.import_module(module)
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))  # a leak ends this process, not the machine
    with result.open("w") as stream:
        for name, seed in files:
            stream.write(json.dumps(asdict(judge(name, seed, folder / f"{name}-{seed}"))) + "\n")
            stream.flush()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    wanted = [(name, int(seed)) for name, _, seed in (text.rpartition(":") for text in sys.argv[3:])]
    from tests.hostile_files import judge_files as judge_all  # kinds register in the module that they import

    judge_all(Path(sys.argv[1]), wanted, Path(sys.argv[2]))

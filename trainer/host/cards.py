"""The parent's side of `card_process`: the latest reading of the cards, and never a wait for a driver that hangs."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from trainer.host.card_process import FAKE_CARDS
from trainer.host.card_readings import Reading, Xid, reading_from_line

_OURS = str(Path(__file__).parents[2])
_PROGRAM = f"import sys; sys.path[0] = {_OURS!r}; from trainer.host.card_process import main; main()"
SILENT_AFTER_S = 60.0
_DRIVER_FILES = ("/dev/nvidiactl", "/dev/dxg")


def has_cards() -> bool:
    """Whether there is a driver to ask, or a file that stands for one."""
    return FAKE_CARDS in os.environ or any(Path(file).exists() for file in _DRIVER_FILES)


class CardReader:
    """Readings at intervals. Use as a context manager; its process ends with it."""

    def __init__(self, interval_s: float) -> None:
        self._latest = Reading(None, why="not read yet")
        self._xids: list[Xid] = []
        self._read_s = time.monotonic()
        self._lock = threading.Lock()
        self._process = start_reader([str(interval_s)])
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                reading = reading_from_line(line)
                with self._lock:
                    self._latest, self._read_s = reading, time.monotonic()
                    self._xids += reading.xids

    def latest(self) -> Reading:
        """The latest reading of the cards, with all XIDs since the last call."""
        with self._lock:
            xids, self._xids = tuple(self._xids), []
            return Reading(self._latest.cards, xids, self._latest.why)

    def silent_s(self) -> float:
        """Seconds since the driver has answered; 0 where there is none to ask."""
        with self._lock:
            return 0.0 if self._latest.cards is None and self._process.poll() is not None else self._age()

    def _age(self) -> float:
        return time.monotonic() - self._read_s

    def __enter__(self) -> "CardReader":
        return self

    def __exit__(self, *_: object) -> None:
        end_reader(self._process)
        self._thread.join(timeout=1.0)


def read_cards(timeout_s: float = 20.0) -> Reading | None:
    """The cards now; None where the driver does not answer in time."""
    process = start_reader([])
    try:
        printed, _ = process.communicate(timeout=timeout_s)
        return reading_from_line(printed)
    except (subprocess.TimeoutExpired, ValueError, TypeError, KeyError):
        return None
    finally:
        end_reader(process)


def start_reader(arguments: list[str]) -> "subprocess.Popen[str]":
    """A process of `card_process`, in a session of its own; end it with `end_reader`."""
    return subprocess.Popen(
        [sys.executable, "-c", _PROGRAM, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # Ctrl-C is for the command
    )


def end_reader(process: "subprocess.Popen[str]") -> None:
    """Kill it, and do not wait for long: in a call that hangs in the kernel it cannot end."""
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=1.0)
    if process.stdout is not None and process.poll() is not None:
        with contextlib.suppress(OSError, ValueError):
            process.stdout.close()

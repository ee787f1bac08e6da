"""A tracker beside the training, as the training sees it: a thread that minds a process, and is never waited for."""

import json
import logging
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from trainer.errors import printable
from trainer.measure.run_arithmetic import format_duration
from trainer.measure.trackers.tracked_run import TrackedRun, begin_again_at

_log = logging.getLogger(__name__)
_OURS = str(Path(__file__).parents[3])
_FOLLOW = f"import sys; sys.path[0] = {_OURS!r}; from trainer.measure.trackers.follow import main; main()"
_POLL_S = 0.5


class TrackerBeside:
    """Keeps one process following the run's records. What fails, or hangs, is told, counted and tried again."""

    ANSWER_S = 120.0
    """How long a tracker may take over one call."""
    END_S = 15.0
    """How long the run's end waits for what is left."""
    PAUSE_S = 30.0
    """Before the first new try; twice as long before each further one."""
    LONGEST_PAUSE_S = 3600.0

    def __init__(self, run: TrackedRun, records: str, last_step: int) -> None:
        """Args: `records`: name of the file; `last_step`: that the run goes on from, -1 at a fresh start."""
        self._run, self._records = run, records
        self._ending = threading.Event()
        self._end_at_s = float("inf")
        self._failures = 0
        self._shown = 0  # records that it has, as far as is known
        self._thread = threading.Thread(target=self._mind, name=f"tracker-{run.kind}", daemon=True)
        try:
            begin_again_at(run.run_dir, run.kind, last_step)
        except OSError as error:
            _log.warning("%s: not begun (%s); training goes on", run.kind, error)
        else:
            self._thread.start()

    def end(self) -> None:
        """Have what is left shown; `wait` waits for it."""
        self._end_at_s = time.monotonic() + self.END_S
        self._ending.set()

    def wait(self) -> None:
        """Until all is shown, or `END_S` have passed since `end`."""
        if self._thread.is_alive():
            self._thread.join(max(self._end_at_s - time.monotonic(), 0) + 5)

    def _mind(self) -> None:
        pause_s = self.PAUSE_S
        while True:
            shown = self._shown
            try:
                reason = self._attend()
            except Exception as error:  # such as no more processes
                reason = str(error) or type(error).__name__
            if reason is None:
                return
            self._failures += 1
            pause_s = self.PAUSE_S if self._shown > shown else pause_s
            then = "the rest is shown by the next start" if self._ending.is_set() else (
                f"tried again in {format_duration(pause_s)}")  # fmt: skip
            count = f"{self._failures} time{'s' if self._failures > 1 else ''} by now"
            _log.warning("%s: %s, %s; training goes on, %s", self._run.kind, reason, count, then)
            if self._ending.is_set():
                return
            self._ending.wait(pause_s)  # at the end, it is tried once more
            pause_s = min(2 * pause_s, self.LONGEST_PAUSE_S)

    def _attend(self) -> str | None:
        """Start the process and listen to it until it ends; why it did, None if it was to."""
        logs = self._run.run_dir / "logs"
        logs.mkdir(exist_ok=True)
        heard, told = os.pipe()
        try:
            with (logs / f"tracker-{self._run.kind}.log").open("wb") as log:
                process = subprocess.Popen(
                    [sys.executable, "-c", _FOLLOW, str(told), self._records],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    pass_fds=(told,),
                )
        except OSError:
            os.close(heard)
            raise
        finally:
            os.close(told)
        with os.fdopen(heard, "rb", buffering=0) as pipe, process:
            try:
                return self._listen(process, pipe.fileno())
            finally:
                process.kill()
                if process.stdin is not None:
                    with suppress(OSError):
                        process.stdin.close()

    def _listen(self, process: "subprocess.Popen[bytes]", pipe: int) -> str | None:
        assert process.stdin is not None
        with suppress(OSError):
            process.stdin.write(self._run.to_json().encode() + b"\n")
            process.stdin.flush()
        busy_since_s: float | None = time.monotonic()
        failed, text = "", b""
        while True:
            now = time.monotonic()
            if self._ending.is_set() and not process.stdin.closed:
                with suppress(OSError):
                    process.stdin.close()  # it takes a last look at the records
            if now > self._end_at_s:
                return f"has not taken all records within {self.END_S:.0f} s of the end"
            if busy_since_s is not None and now - busy_since_s > self.ANSWER_S:
                return f"has not answered for {self.ANSWER_S:.0f} s"
            if not select.select([pipe], [], [], _POLL_S)[0]:
                continue
            data = os.read(pipe, 1 << 16)
            if not data:
                break
            *lines, text = (text + data).split(b"\n")
            for line in lines:
                said = json.loads(line)
                failed = said.get("failed", failed)
                self._shown = said.get("records", self._shown)
                if "busy" in said:
                    busy_since_s = time.monotonic() if said["busy"] else None
        code = process.wait(timeout=10)
        return None if code == 0 else printable(failed or f"its process ended with code {code}", 400)


def end_all(trackers: Sequence[TrackerBeside]) -> None:
    """End several, side by side."""
    for tracker in trackers:
        tracker.end()
    for tracker in trackers:
        tracker.wait()

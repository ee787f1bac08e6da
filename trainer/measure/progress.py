"""What a person sees while a run goes on: one progress bar or plain lines, and `log.txt`."""

import logging
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from trainer.errors import printable_lines
from trainer.measure.run_arithmetic import format_duration
from trainer.measure.telemetry import StepMetrics

LOG_FILE = "log.txt"

_LATEST_STEPS = 50
_BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}  {desc}"
_lines = logging.getLogger(__name__)


class ProgressLine:
    """One bar on a terminal; elsewhere plain lines, the first and the last step always among them.

    Loss, speed and data wait are means over the latest 50 steps, and of the steps alone: a checkpoint or a
    validation leaves no dent in them. The time left counts such pauses at the share they have had so far.
    Plain lines come every 10 s in the first 10 minutes, then every minute. They go through `logging`, so
    that `log.txt` has them beside a bar too. For rank 0 only.

    Attributes:
        waiting: what steps wait for, in words, shown in place of the wait for data; empty: nothing worth saying.

    Args:
        total_steps: steps of the whole run.
        start_step: step that the run goes on from.
        stream: where the bar is drawn, if it is a terminal; default: standard error.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        terminal: TextIO = stream or sys.stderr
        self._total_steps = total_steps
        self._clock = clock
        self._latest: deque[StepMetrics] = deque(maxlen=_LATEST_STEPS)
        self.waiting = ""
        self._num_updates = 0
        self._busy_s = 0.0  # in steps, since the first one was done
        self._first_done_s = self._last_line_s = clock()
        self._bar = None
        if _can_show_a_bar(terminal):
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=terminal,
                dynamic_ncols=True,
                bar_format=_BAR,
                desc="first step",
            )

    def update(self, metrics: StepMetrics) -> None:
        """Takes in the step that was just done, and shows it when it is time to."""
        now_s = self._clock()
        self._num_updates += 1
        if self._num_updates == 1:
            self._first_done_s = now_s
        else:
            self._busy_s += metrics.step_s
        if self._num_updates == 2:
            # The first step allocates and selects kernels: its speed is not the run's.
            self._latest.clear()
        self._latest.append(metrics)
        if self._bar is not None:
            self._bar.set_description_str(self._bar_text(), refresh=False)
            self._bar.update()
        interval_s = 10 if now_s - self._first_done_s < 600 else 60
        due = now_s - self._last_line_s >= interval_s
        if due or self._num_updates == 1 or metrics.step == self._total_steps:
            self._last_line_s = now_s
            _lines.info("step %d/%d  %s", metrics.step, self._total_steps, self._line_text())

    @property
    def images_per_s(self) -> float:
        """Images of all workers per second, over the latest steps."""
        return self._sum("images") / max(self._sum("step_s"), 1e-9)

    @property
    def time_left_s(self) -> float:
        """Seconds to the end at the latest speed, pauses included at their share so far; 0 before any step."""
        if not self._latest:
            return 0.0
        elapsed_s = self._clock() - self._first_done_s
        pauses = max(elapsed_s / self._busy_s, 1.0) if self._busy_s > 0 else 1.0
        return (self._total_steps - self._latest[-1].step) * self._sum("step_s") / len(self._latest) * pauses

    def set_total_steps(self, total_steps: int) -> None:
        """The run ends at another step than was thought before."""
        self._total_steps = total_steps
        if self._bar is not None:
            self._bar.total = total_steps

    def close(self) -> None:
        """Leaves the bar as it stands and ends its line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sum(self, name: str) -> float:
        return math.fsum(getattr(metrics, name) for metrics in self._latest)

    def _bar_text(self) -> str:
        # The dearest first: a narrow terminal cuts off the end.
        return "  ".join((self._loss(), self._speed(), *self._bad(), *self._left(), self._data_wait()))

    def _line_text(self) -> str:
        latest = self._latest[-1]
        lr = f"lr {latest.effective_lr:.1e}{'' if latest.found_lr is None else f' (d {latest.found_lr:.1e})'}"
        return "  ".join((self._loss(), lr, self._speed(), self._data_wait(), *self._bad(), *self._left()))

    def _loss(self) -> str:
        # A step without one readable image has no loss.
        losses = [metrics.loss for metrics in self._latest if metrics.images]
        return f"loss {math.fsum(losses) / len(losses):.3f}" if losses else "loss -"

    def _speed(self) -> str:
        return f"{self.images_per_s:.{1 if self.images_per_s >= 1 else 2}f} img/s"

    def _data_wait(self) -> str:
        if self.waiting:
            return f"waiting: {self.waiting}"
        return f"data wait {100 * self._sum('data_wait_s') / max(self._sum('step_s'), 1e-9):.0f} %"

    def _bad(self) -> list[str]:
        return [f"bad {self._latest[-1].bad_rows:,}"] if self._latest[-1].bad_rows else []

    def _left(self) -> list[str]:
        return [f"left {format_duration(self.time_left_s)}"] if self._latest[-1].step < self._total_steps else []


class _LogFile(logging.FileHandler):
    """On a full disk lines are lost; logging's own complaint would be a traceback for each."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Nothing: the screen has the line."""


@contextmanager
def open_log(run_dir: Path, rank: int, stream: TextIO | None = None) -> Iterator[None]:
    """Sends `logging` to `log.txt` (with the time, appended) and to the terminal, around a bar if there is one.

    Rank 0 passes on what `trainer` logs from INFO and everybody else from WARNING; other ranks pass on
    warnings and errors alone, marked with their rank.

    Args:
        run_dir: the run directory; made if it is missing.
        rank: of this worker.
        stream: the terminal, or what stands in for it; default: standard error.
    """
    terminal: TextIO = stream or sys.stderr
    run_dir.mkdir(parents=True, exist_ok=True)
    screen = _BarSafeHandler(terminal)
    if _can_show_a_bar(terminal):
        screen.addFilter(lambda record: record.name != _lines.name)  # the bar shows them
    file = _LogFile(run_dir / LOG_FILE, encoding="utf-8")
    who = f"rank {rank}: " if rank else ""
    screen.setFormatter(_LevelFormatter(f"{who}%(level)s%(message)s"))
    file.setFormatter(_LevelFormatter(f"%(asctime)s  {who}%(level)s%(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    root, ours = logging.getLogger(), logging.getLogger("trainer")
    level_before = ours.level
    ours.setLevel(logging.WARNING if rank else logging.INFO)
    for handler in (screen, file):
        root.addHandler(handler)
    try:
        yield
    finally:
        for handler in (screen, file):
            root.removeHandler(handler)
            handler.close()
        ours.setLevel(level_before)


def _can_show_a_bar(stream: TextIO) -> bool:
    # Some containers have a terminal of no columns, on which tqdm draws nothing.
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


class _BarSafeHandler(logging.Handler):
    """Writes whole lines above any open bar."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # One write for a line, since other ranks may share the stream.
            tqdm.write(self.format(record) + "\n", file=self._stream, end="")
            self._stream.flush()
        except OSError:  # the terminal is gone: the run goes on, and log.txt has the line
            self.handleError(record)


class _LevelFormatter(logging.Formatter):
    """Names the level where it is a warning or worse, as `%(level)s`; nothing in a record steers the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        record.level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return printable_lines(super().format(record))

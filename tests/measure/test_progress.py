import fcntl
import io
import logging
import math
import os
import pty
import re
import struct
import termios
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.measure.progress import LOG_FILE, ProgressLine, open_log
from trainer.measure.telemetry import StepMetrics

STEP = StepMetrics(
    step=1, epoch=0.1, loss=0.8, lr=1e-4, grad_norm=1.0, images=8, images_seen=8, data_wait_s=0.015, step_s=1.5
)
_log = logging.getLogger("trainer.train.loop")


class Clock:
    """Seconds that pass when the test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def run_steps(progress: ProgressLine, clock: Clock, steps: range, step_s: float = 1.5) -> None:
    for step in steps:
        clock.now_s += step_s
        progress.update(replace(STEP, step=step, step_s=step_s, data_wait_s=0.01 * step_s))


def test_plain_lines_at_a_sane_rate(tmp_path: Path) -> None:
    clock, stream = Clock(), io.StringIO()
    with open_log(tmp_path, 0, stream), ProgressLine(120, 0, stream, clock) as progress:
        run_steps(progress, clock, range(1, 121))
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 1/120  loss 0.800  lr 1.0e-04  5.3 img/s  data wait 1 %  left 3 min"
    assert lines[-1] == "step 120/120  loss 0.800  lr 1.0e-04  5.3 img/s  data wait 1 %"
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines[:4]] == [1, 8, 15, 22]
    assert len(lines) == 1 + 119 // 7


def test_a_found_rate_is_shown_with_what_it_was_found_as(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_log(tmp_path, 0, stream), ProgressLine(1, 0, stream, Clock()) as progress:
        progress.update(replace(STEP, lr=0.5, found_lr=4e-5))
    assert "  lr 2.0e-05 (d 4.0e-05)  " in stream.getvalue()


def test_bad_rows_are_shown_and_a_step_of_nothing_else_has_no_loss(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_log(tmp_path, 0, stream), ProgressLine(4, 0, stream, Clock()) as progress:
        progress.update(replace(STEP, loss=math.nan, images=0, bad_rows=8))
        progress.set_total_steps(3)
        progress.update(replace(STEP, step=2, loss=math.nan, images=0, bad_rows=1016))
        progress.update(replace(STEP, step=3, bad_rows=1016))
    first, last = stream.getvalue().splitlines()
    assert first.startswith("step 1/4  loss -  lr 1.0e-04  0.00 img/s  data wait 1 %  bad 8  left")
    assert last == "step 3/3  loss 0.800  lr 1.0e-04  2.7 img/s  data wait 1 %  bad 1,016"


def test_what_is_waited_for_takes_the_place_of_the_data(tmp_path: Path) -> None:
    stream = io.StringIO()
    with open_log(tmp_path, 0, stream), ProgressLine(3, 0, stream, Clock()) as progress:
        progress.update(STEP)
        progress.waiting = "61 % all-reduce, rank 2 slowest (data)"
        progress.update(replace(STEP, step=3))
    first, last = stream.getvalue().splitlines()
    assert "  data wait 1 %" in first and "waiting" not in first
    assert last == "step 3/3  loss 0.800  lr 1.0e-04  5.3 img/s  waiting: 61 % all-reduce, rank 2 slowest (data)"


def test_lines_become_rarer_in_a_long_run(tmp_path: Path) -> None:
    clock, stream = Clock(), io.StringIO()
    with open_log(tmp_path, 0, stream), ProgressLine(10_000, 0, stream, clock) as progress:
        run_steps(progress, clock, range(1, 10_001), step_s=0.5)
    assert len(stream.getvalue().splitlines()) == pytest.approx(600 / 10 + 4400 / 60, abs=3)


def test_speed_is_that_of_the_latest_steps_and_pauses_leave_no_dent() -> None:
    clock = Clock()
    with ProgressLine(1000, 0, io.StringIO(), clock) as progress:
        run_steps(progress, clock, range(1, 2), step_s=60.0)  # the first step is slow
        run_steps(progress, clock, range(2, 101), step_s=2.0)
        assert progress.images_per_s == pytest.approx(4.0)
        assert progress.time_left_s == pytest.approx(900 * 2.0)
        clock.now_s += 99 * 2.0  # a checkpoint as long as all steps so far
        run_steps(progress, clock, range(101, 102), step_s=2.0)
        assert progress.images_per_s == pytest.approx(4.0)
        assert progress.time_left_s == pytest.approx(899 * 2.0 * 2, rel=0.02)
        run_steps(progress, clock, range(102, 152), step_s=1.0)
        assert progress.images_per_s == pytest.approx(8.0)


def test_after_a_resume_the_time_left_counts_what_is_left() -> None:
    clock = Clock()
    with ProgressLine(1000, 900, io.StringIO(), clock) as progress:
        run_steps(progress, clock, range(901, 951), step_s=2.0)
        assert progress.time_left_s == pytest.approx(50 * 2.0)


def test_log_has_times_and_levels_and_appends(tmp_path: Path) -> None:
    stream = io.StringIO()
    for rank, text in ((0, "from rank 0"), (2, "from rank 2")):
        with open_log(tmp_path, rank, stream):
            _log.info("an info %s", text)
            _log.warning("a warning %s", text)
            logging.getLogger("somebody.else").info("not ours")
    told = ["an info from rank 0", "warning: a warning from rank 0", "rank 2: warning: a warning from rank 2"]
    assert stream.getvalue().splitlines() == told
    lines = (tmp_path / LOG_FILE).read_text().splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", "", line) for line in lines] == told
    assert all(line.startswith("20") for line in lines)


def test_after_the_log_is_closed_nothing_reaches_it(tmp_path: Path) -> None:
    with open_log(tmp_path, 0, io.StringIO()):
        pass
    _log.warning("too late")
    assert (tmp_path / LOG_FILE).read_text() == ""


def test_a_terminal_that_is_gone_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", False)
    read_end, write_end = os.pipe()
    os.close(read_end)
    stream = os.fdopen(write_end, "w")
    with open_log(tmp_path, 0, stream):
        _log.info("still here")
    assert "still here" in (tmp_path / LOG_FILE).read_text()
    with pytest.raises(BrokenPipeError):
        stream.close()


def shown_on_a_terminal(run_dir: Path, columns: int) -> list[str]:
    """The lines that a terminal shows at the end of a short run."""
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    received: list[bytes] = []

    def read() -> None:
        try:
            while chunk := os.read(reader, 4096):
                received.append(chunk)
        except OSError:  # the other end was closed
            pass

    thread = threading.Thread(target=read)
    thread.start()
    clock = Clock()
    terminal = os.fdopen(writer, "w")
    with terminal, open_log(run_dir, 0, terminal), ProgressLine(40, 10, terminal, clock) as progress:
        run_steps(progress, clock, range(11, 31))
        _log.info("checkpoint written: %s", "x" * 40)
        run_steps(progress, clock, range(31, 41))
    thread.join(timeout=120)
    os.close(reader)
    return [line.split("\r")[-1] for line in b"".join(received).decode().replace("\r\n", "\n").split("\n")]


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_there_is_one_bar_and_log_lines_stay_whole(tmp_path: Path, columns: int) -> None:
    lines = shown_on_a_terminal(tmp_path, columns)
    assert f"checkpoint written: {'x' * 40}" in lines
    (bar,) = [line for line in lines if "|" in line]
    assert re.fullmatch(r"100%\|\S+\| 40/40  loss 0.800  5.3 img/s  data wait 1 %", bar)
    assert not any(line.startswith("step ") for line in lines)
    assert "step 40/40  loss 0.800" in (tmp_path / LOG_FILE).read_text()


def test_a_terminal_of_no_columns_gets_plain_lines(tmp_path: Path) -> None:
    lines = shown_on_a_terminal(tmp_path, 0)
    assert lines[0].startswith("step 11/40  loss 0.800")
    assert not any("|" in line for line in lines)

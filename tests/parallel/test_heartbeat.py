"""Who has stopped moving, by records of real time; and what follows from how an attempt ended."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from trainer.parallel.failure import Failure, oom_kills, silent_failure
from trainer.parallel.heartbeat import LOADING, WRITING, Heartbeat, beat_path, find_late, is_stopped, read_beat
from trainer.parallel.launch import WorkersResult
from trainer.parallel.supervise import MOST_MEMORY_ATTEMPTS, Attempts, Verdict, judge


def test_a_part_may_take_five_times_the_longest_that_it_took(tmp_path: Path) -> None:
    beat = Heartbeat(beat_path(tmp_path, 0), hang_after_s=0.01, at_first_s=100.0)
    for step in range(4):
        beat.begin("a step", step)
        time.sleep(0.02)
        beat.begin("data", step)
    beat.begin("a step", 4)
    found = read_beat(tmp_path, 0)
    assert found is not None and (found.part, found.step, found.taken) == ("a step", 4, 4)
    assert 0.1 <= found.allowed_s < 1.0 and time.monotonic() - found.since_s < 1.0
    beat.begin("a checkpoint", 4)
    assert (found := read_beat(tmp_path, 0)) is not None and found.allowed_s == 100.0
    slow = Heartbeat(None, 60.0, 100.0)
    slow.begin("data", 0)
    assert read_beat(tmp_path, 1) is None


def test_of_several_that_wait_the_one_that_moved_least_is_late(tmp_path: Path) -> None:
    beats = [Heartbeat(beat_path(tmp_path, rank), 0.05, 0.05) for rank in range(3)]
    for beat in beats:
        beat.begin("data", 7)
    assert find_late(tmp_path, range(3)) is None
    beats[0].begin("a step", 7)
    beats[2].begin("a step", 7)
    time.sleep(0.1)
    late = find_late(tmp_path, range(3))
    assert late is not None and late[0] == 1 and late[1].part == "data"
    assert find_late(tmp_path, []) is None
    for beat in beats:
        beat.rest()
    assert find_late(tmp_path, range(3)) is None


def test_garbage_is_no_record(tmp_path: Path) -> None:
    beat_path(tmp_path, 0).write_bytes(b"short")
    assert read_beat(tmp_path, 0) is None and find_late(tmp_path, [0]) is None


def test_a_stopped_process_is_told_from_one_that_runs() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        assert not is_stopped(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert is_stopped(process.pid)
        process.kill()


def test_a_kill_is_not_called_a_lack_of_memory_unless_the_kernel_counts_one() -> None:
    before = oom_kills()
    assert before is not None
    assert "somebody else's doing" in silent_failure(1, -9, "", before).text
    assert "for want of host memory" in silent_failure(1, -9, "", before - 1).text
    assert silent_failure(1, -9, "").text == "was ended by SIGKILL (exit 137)"
    assert silent_failure(0, -11, "").text == "was ended by SIGSEGV"


def ended(kind: str | None, steps: int = 10, stopped_by: signal.Signals | None = None) -> WorkersResult:
    failure = Failure(2, kind, 0.0, "failed so") if kind else None  # type: ignore[arg-type]
    return WorkersResult(1 if kind else 0, (), failure, stopped_by, steps)


FIRST = Attempts()


def verdict_of(result: WorkersResult, attempts: Attempts = FIRST, newest: str | None = None, most: int = 3) -> Verdict:
    return judge(result, attempts, newest, most_fruitless=most, plans=True)


@pytest.mark.parametrize(
    "result", [ended(None), ended("user"), ended("signal", stopped_by=signal.SIGTERM), ended("error", steps=0)]
)
def test_what_another_start_would_not_mend(result: WorkersResult) -> None:
    assert verdict_of(result).attempts is None


@pytest.mark.parametrize("kind", ["signal", "exit", "error", "lost_peer", "hang"])
def test_faults_are_started_again_with_longer_pauses_and_then_given_up(kind: str) -> None:
    attempts, pauses = Attempts(), []
    for _ in range(3):
        verdict = verdict_of(ended(kind), attempts)
        assert verdict.attempts is not None and "starting again from the start" in verdict.line
        attempts = verdict.attempts
        pauses.append(verdict.pause_s)
    assert pauses == [5.0, 10.0, 20.0]
    last = verdict_of(ended(kind), attempts)
    assert last.attempts is None and last.line == "3 starts in a row brought no new checkpoint; giving up"
    again = verdict_of(ended(kind), attempts, newest="step-00000100")
    assert again.attempts == Attempts(restarts=4, fruitless=1, checkpoint="step-00000100")
    assert again.pause_s == 5.0
    assert verdict_of(ended(kind), most=0).attempts is None


@pytest.mark.parametrize("kind", ["numerics", "corrupt"])
def test_who_goes_back_says_where_to(kind: str) -> None:
    """Also after the very first step, and as often as other faults."""
    verdict = verdict_of(ended(kind, steps=0), newest="step-00000100")
    assert verdict.line == "failed so; starting again there in 5 s (1 of 3 without a new checkpoint)"
    assert verdict.attempts == Attempts(restarts=1, fruitless=1, checkpoint="step-00000100")
    assert verdict_of(ended(kind), most=0) == Verdict(None)


def test_less_memory_is_tried_without_a_pause_and_not_for_ever() -> None:
    verdict = verdict_of(ended("memory", steps=0))
    assert verdict.attempts == Attempts(memory=1) and verdict.pause_s == 0
    assert verdict_of(ended("memory"), replace(Attempts(), memory=MOST_MEMORY_ATTEMPTS - 1)).attempts is None


def test_who_waits_for_a_disk_is_not_late_nor_are_those_who_wait_for_him(tmp_path: Path) -> None:
    """As long as bytes arrive there; and not those who are behind, whom he waits for himself."""
    beats = [Heartbeat(beat_path(tmp_path, rank), 0.05, 0.05) for rank in range(3)]
    for beat in beats:
        beat.begin("a step", 7)
    time.sleep(0.1)
    beats[1].begin(WRITING)
    assert find_late(tmp_path, range(3)) is None
    found = read_beat(tmp_path, 1)
    assert found is not None and (found.part, found.step) == (WRITING, 7)
    time.sleep(0.1)
    late = find_late(tmp_path, range(3))
    assert late is not None, "the disk has stopped"
    beats[1].begin(WRITING, 8)
    late = find_late(tmp_path, range(3))
    assert late is not None and late[0] in (0, 2) and late[1].step == 7


def test_loading_is_watched_and_counts_no_step(tmp_path: Path) -> None:
    beat = Heartbeat(beat_path(tmp_path, 0), 0.05, 0.05)
    beat.begin(LOADING, 0)
    time.sleep(0.1)
    late = find_late(tmp_path, [0])
    assert late is not None and (late[1].part, late[1].taken) == (LOADING, 0)
    beat.begin("data", 400)
    beat.begin("a step", 401)
    found = read_beat(tmp_path, 0)
    assert found is not None and (found.step, found.taken) == (401, 1)


def test_a_full_disk_does_not_end_the_worker() -> None:
    full = Path("/dev/full")
    with pytest.raises(OSError, match="No space left"), full.open("wb", buffering=0) as file:
        file.write(b"record")
    beat = Heartbeat(full, 1.0, 1.0)
    beat.begin("a step", 1)
    assert beat.part == "a step"
    beat.rest()


def test_lack_of_memory_by_chance_does_not_end_a_long_run() -> None:
    """Where checkpoints appear between them, it goes on with the least of all plans; where none do, it ends."""
    failure = Failure(0, "memory", 0.0, "no memory")
    attempts, ended = Attempts(checkpoint="step-0"), WorkersResult(1, (1,), failure, None)
    for number in range(3 * MOST_MEMORY_ATTEMPTS):
        verdict = judge(ended, attempts, f"step-{number}", most_fruitless=3, plans=True)
        assert verdict.attempts is not None and verdict.attempts.memory <= MOST_MEMORY_ATTEMPTS - 1
        attempts = verdict.attempts
    assert attempts.memory == MOST_MEMORY_ATTEMPTS - 1
    assert judge(ended, attempts, attempts.checkpoint, most_fruitless=3, plans=True).attempts is None

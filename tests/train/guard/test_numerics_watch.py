"""What a run does about skipped steps, apart from real runs: overflows of fp16, a disk that takes no order."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.real_run import ALONE
from trainer.data.sampler import Position, same_each_epoch
from trainer.errors import NumbersGoneWrong, UserError
from trainer.train.guard.left_out_record import read_left_out
from trainer.train.guard.numerics_guard import GuardRules, NumericsGuard
from trainer.train.guard.numerics_watch import NumericsWatch
from trainer.train.saved.state import TrainState
from trainer.train.step import StepResult

START = TrainState(0, 0, Position.start(1, 4), "000001.json", 5)
BAD = StepResult(0.5, 4, math.inf, 0, (), False, keys=("a", "b"))


def watch_in(run_dir: Path, rules: GuardRules) -> NumericsWatch:
    return NumericsWatch(rules, True, (run_dir,), ALONE, START)


def skipped_by(rules: GuardRules, in_a_row: int) -> tuple[TrainState, StepResult]:
    """The run after so many bad steps, and the last of them."""
    verdict = NumericsGuard().judge(rules, BAD.loss, BAD.grad_norm, 4)
    position = replace(START.position, step=in_a_row)
    guard = NumericsGuard(in_a_row=in_a_row if verdict.is_fault else 0, sound_step=0)
    return replace(START, step=in_a_row, position=position, guard=guard), replace(BAD, verdict=verdict)


def nothing() -> None:
    """No save is under way."""


def test_thirty_overflows_in_a_row_end_a_run_in_fp16(tmp_path: Path) -> None:
    rules = GuardRules(in_fp16=True)
    watch, (state, overflow) = watch_in(tmp_path, rules), skipped_by(rules, 3)
    for steps in (29, 29):
        for _ in range(steps):
            watch.react(state, overflow, same_each_epoch([40]), nothing)
        watch.react(
            state,
            replace(overflow, grad_norm=1.0, verdict=NumericsGuard().judge(rules, 1, 1, 4)),
            same_each_epoch([40]),
            nothing,
        )
    for _ in range(29):
        watch.react(state, overflow, same_each_epoch([40]), nothing)
    with pytest.raises(UserError, match="the gradients of 30 steps in a row were not finite in fp16"):
        watch.react(state, overflow, same_each_epoch([40]), nothing)
    assert not (tmp_path / "skipped.jsonl").exists()


def test_three_in_a_row_leave_an_order(tmp_path: Path) -> None:
    rules = GuardRules()
    watch, settled = watch_in(tmp_path, rules), []
    for in_a_row in (1, 2):
        watch.react(*skipped_by(rules, in_a_row), same_each_epoch([40]), nothing)
    with pytest.raises(
        NumbersGoneWrong, match="the next start goes on from where this one began, without the data of the 3"
    ):
        watch.react(*skipped_by(rules, 3), same_each_epoch([40]), lambda: settled.append(1))
    assert settled == [1] and json.loads((tmp_path / "roll_back.json").read_text()) == {"last_step": 0}
    (stretch,) = read_left_out(tmp_path).stretches
    assert (stretch.begin, stretch.end) == ((0,), (12,))
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [(line["step"], line["grad_norm"], line["keys"]) for line in lines] == [
        (n, None, ["a", "b"]) for n in (1, 2, 3)
    ]


def test_a_disk_that_holds_no_order_ends_the_run_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rules = GuardRules()
    with pytest.raises(UserError) as raised:
        watch_in(tmp_path / "absent", rules).react(*skipped_by(rules, 3), same_each_epoch([40]), nothing)
    (line,) = raised.value.lines
    assert "cannot be written: No such file or directory" in line and "\n" not in line
    assert "skipped.jsonl: not written" in caplog.text


def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "left_out.json").write_text('{"left_out": [3]}')
    with pytest.raises(UserError, match=r"left_out.json: not what was written; delete it"):
        read_left_out(tmp_path)

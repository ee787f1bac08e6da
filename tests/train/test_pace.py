"""Real runs of two workers, of which one takes longer for its forward passes."""

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.data.small_set import write_small_set
from tests.train.real_run import run_config
from trainer.cli.start_workers import start_workers
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.measure.step_clock import PHASES, StepClock
from trainer.measure.telemetry import TENSORBOARD_DIR, read_metrics
from trainer.parallel.comm import Comm
from trainer.parallel.strategy import Sharing
from trainer.train.pace import Pace


def test_many_workers_tell_of_several_steps_together() -> None:
    """All of them in the same steps, and what they tell is of one step."""
    seconds, paces = 0.02, []
    for rank in (0, 99):
        clock, strategy = StepClock(torch.device("cpu")), SimpleNamespace(sharing=Sharing("ddp"))
        comm = Comm(rank, 100, 0, torch.device("cpu"))
        paces.append(Pace(SimpleNamespace(comm=comm, clock=clock, strategy=strategy, exchange_is_timed=True), 7))  # type: ignore[arg-type]
    for step in (8, 9, 10):
        told = []
        for pace in paces:
            pace.clock.mark("forward")
            time.sleep(seconds)
            pace.clock.mark("other")
            told.append(pace.tell())
        due = step == 9  # 100 workers with 11 numbers each are three exchanges of 512
        assert [bool(each) for each in told] == [due, due]
        sums = [sum(numbers) for numbers in zip(*told, strict=True)]
        *_, rows = [pace.after_step(sums, step) for pace in paces]
        if due:
            assert len(rows) == 100 and {rank for rank, row in enumerate(rows) if any(row)} == {0, 99}
            # Of the two steps since the start, each: a third one would make it less.
            assert rows[0][PHASES.index("forward")] > seconds and rows[99][-1] > 0.01


@pytest.mark.e2e
@pytest.mark.parametrize(("strategy", "exchange"), [("ddp", "all-reduce"), ("zero2", "exchange")])
def test_a_worker_that_is_slow_is_named(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, exchange: str
) -> None:
    """In the log, on the line of progress and in the records, however the workers share the model."""
    root = write_small_set(tmp_path / "prepared", {Bucket(64, 64): 16})
    config = run_config(model_folder, root, tmp_path / "run").model_dump(mode="json")
    config |= {"launch": {"workers": 2, "threads_per_worker": 1}, "guard": {"spike_sigma": 0.0}}
    config["train"] |= {"steps": 70, "batch_size_per_gpu": 1}
    config["memory"] |= {"strategy": strategy}
    monkeypatch.setenv("FAULT", "slow@1:1-70:0.3")
    assert start_workers("train", Config.model_validate(config), tmp_path / "run", {}) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("worker 1 computes slowly: ") == 1 and "worker 0 computes slowly" not in log
    assert "forward passes of a step, median/p99 in ms by worker: " in log
    assert re.search(rf"step \d+/70 .* waiting: \d\d % {exchange}, rank 1 slowest \(forward\)", log)
    records = [record for record in read_metrics(tmp_path / "run") if record["kind"] == "phases"]
    last = records[-1]
    assert last["step"] == 70 and last["slowest"] == last["straggler"] == 1 and last["straggler_score"] < 0.8
    phases = ["data", "encode", "copy", "forward", "backward", "exchange", "optimizer", "save", "other"]
    for names in (phases, [f"slowest/{name}" for name in phases]):
        assert sum(last[name] for name in names) == pytest.approx(1.0)
    # Worker 0 waits 0.3 s in each step, which worker 1 spends in its forward pass.
    middle = records[-2]
    assert middle["busy_s/1"] - middle["busy_s/0"] > 0.15 and middle["slowest/forward"] * middle["period_s"] > 0.3
    assert middle["exchange"] > middle["slowest/exchange"]
    assert middle["images_per_s"] == pytest.approx(2 / middle["period_s"]) and middle["rss_gib"] > 0.1
    events = EventAccumulator(str(tmp_path / "run" / TENSORBOARD_DIR)).Reload()
    assert events.Scalars("phases/exchange")[-1].value == pytest.approx(last["exchange"])

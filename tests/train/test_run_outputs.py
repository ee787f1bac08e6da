"""When it is said where the time goes, and what the records of it hold."""

import itertools
import logging
from pathlib import Path

import pytest

from trainer.measure.run_times import RunTimes
from trainer.measure.step_clock import PHASES
from trainer.measure.stragglers import LATEST, Stragglers
from trainer.measure.telemetry import MetricsWriter, read_metrics
from trainer.train.told.run_outputs import TimesTold

STEP_S, IMAGES, PIXELS = 2.0, 8.0, 1024.0 * 1024.0
FLOPS_PER_PX, PEAK = 3e6, 4 * 71e12


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def rows(data: float) -> list[list[float]]:
    """Of two workers, the second of which waits so many seconds for data, and the first as many for it."""
    of = {"forward": 0.5, "backward": STEP_S - 0.5 - data}
    each = [of | {"exchange": data}, of | {"data": data}]
    return [[*(own.get(phase, 0.0) for phase in PHASES), 20.5, 3.0 + rank] for rank, own in enumerate(each)]


def test_every_few_seconds_on_the_bar_and_ever_more_seldom_on_the_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, stragglers, said = Clock(), Stragglers(2), list[tuple[float, str]]()
    caplog.set_level(logging.INFO)
    told = TimesTold(RunTimes(PHASES, "all-reduce"), stragglers, FLOPS_PER_PX, PEAK, clock)
    steps = 1 + 300 + 300
    with MetricsWriter(tmp_path, None, tensorboard=False) as metrics:
        for step in range(1, steps + 1):
            clock.now_s += STEP_S
            data = 1.0 if 200 < step <= 300 else 0.0
            stragglers.note([0.5, 0.625])
            waiting = told.after_step(rows(data), IMAGES, PIXELS, step, metrics, done=step == steps)
            if waiting is not None:
                said.append((clock.now_s, waiting))
    assert all(after - before == 2 * STEP_S for (before, _), (after, _) in itertools.pairwise(said))
    assert [text for _, text in said if text][50 // 2] == "25 % all-reduce, 25 % data, rank 1 slowest (data)"
    assert said[0][1] == said[-1][1] == ""
    records = read_metrics(tmp_path)
    gaps = [after["step"] - before["step"] for before, after in itertools.pairwise(records)]
    assert gaps[:50] == [5] * 50 and gaps[60:] == [30] * (len(gaps) - 61) + gaps[-1:] and records[-1]["step"] == steps
    assert {record["kind"] for record in records} == {"phases"}
    assert sum(("where the time goes: " in line) for line in caplog.messages) == 1 + (steps - 31) // 300
    first, middle = records[0], next(record for record in records if record["step"] == 250)
    assert first["period_s"] == pytest.approx(STEP_S) and first["images_per_s"] == pytest.approx(IMAGES / STEP_S)
    # 8 images of 1 MP, 3 TFLOP each, in 2 s, on four cards of 71 TFLOP/s.
    assert first["mfu"] == pytest.approx(8 * 1.048576 * 3 / 2 / (4 * 71), rel=1e-6)
    assert first["vram_gib"] == 20.5 and first["rss_gib"] == 4.0 and "straggler" not in first
    assert middle["data"] == pytest.approx(0.25) and middle["slowest/data"] == pytest.approx(0.5)
    assert middle["slowest"] == 1 and (middle["busy_s/0"], middle["busy_s/1"]) == pytest.approx((1.0, 2.0))
    assert middle["step"] > LATEST and (middle["straggler"], middle["straggler_score"]) == (1, pytest.approx(0.8))


def test_what_is_not_known_is_no_number(tmp_path: Path) -> None:
    told = TimesTold(RunTimes(PHASES, "exchange"), Stragglers(2))
    with MetricsWriter(tmp_path, None, tensorboard=False) as metrics:
        for step in (1, 2):
            told.after_step(rows(0.0), IMAGES, PIXELS, step, metrics, done=step == 2)
    (record,) = read_metrics(tmp_path)
    assert record["images_per_s"] == pytest.approx(4.0) and "mfu" not in record


def test_a_run_of_one_step_has_no_usual_step(tmp_path: Path) -> None:
    told = TimesTold(RunTimes(PHASES, "exchange"), Stragglers(2))
    with MetricsWriter(tmp_path, None, tensorboard=False) as metrics:
        told.after_step(rows(0.0), IMAGES, PIXELS, 1, metrics, done=True)
    assert read_metrics(tmp_path) == []

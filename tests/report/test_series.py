"""Numbers of a run in bounded memory: against all of them, kept and cut by hand."""

import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest

from trainer.measure.telemetry import METRICS_FILE, MetricsWriter, StepMetrics
from trainer.report.run_series import HostSeries, RunSeries
from trainer.report.series import POINTS, Series


def series_of(values: np.ndarray, first: int = 1) -> Series:
    series = Series()
    for step, value in enumerate(values.tolist(), first):
        series.add(step, value)
    return series


@pytest.mark.parametrize("count", [1, 3, POINTS, POINTS + 1, 4097, 5000, 65_536, 100_003])
def test_thinned_values_are_those_of_all_values(count: int) -> None:
    """Means, least and greatest of stretches that follow each other and leave nothing out."""
    values = np.random.default_rng(count).normal(size=count)
    values[count // 3] = 1e6  # a spike must be seen
    series = series_of(values)
    assert len(series) == count
    thin = series.thinned()
    if count <= POINTS:
        assert [*thin] == ["x", "y"] and thin["x"] == [*range(1, count + 1)]
        assert thin["y"] == pytest.approx(values, rel=1e-5)
        return
    ends = [int(x) for x in thin["x"]]
    assert POINTS // 2 <= len(ends) <= POINTS and ends[-1] == count and ends == sorted({*ends})
    begins = [0, *ends[:-1]]
    sizes = [end - begin for begin, end in zip(begins, ends, strict=True)]
    assert max(sizes) <= 4 * count / POINTS + 1, "stretches are about as long as each other"
    parts = [values[begin:end] for begin, end in zip(begins, ends, strict=True)]
    assert thin["y"] == pytest.approx([math.fsum(part) / len(part) for part in parts], rel=1e-5, abs=1e-6)
    assert thin["low"] == pytest.approx([part.min() for part in parts], rel=1e-5)
    assert thin["high"] == pytest.approx([part.max() for part in parts], rel=1e-5)
    assert max(thin["high"]) == 1e6


def test_fewer_points_are_asked_for() -> None:
    values = np.arange(10_000.0)
    thin = series_of(values, 0).thinned(100)
    assert 90 <= len(thin["x"]) <= 100 and thin["low"][0] == 0 and thin["high"][-1] == 9999
    sizes = np.diff([-1, *thin["x"]])
    assert sizes.sum() == 10_000 and np.dot(sizes, thin["y"]) == pytest.approx(values.sum(), rel=1e-4)


def test_memory_does_not_grow_with_the_steps() -> None:
    def held(series: Series) -> int:
        arrays = (series._x, series._y, series._last, series._sum, series._low, series._high)
        return sum(map(sys.getsizeof, arrays))

    short, long = series_of(np.zeros(20_000)), series_of(np.zeros(400_000))
    assert held(long) < 160_000 and held(long) < 2 * held(short)


@pytest.mark.parametrize("back", [1, 700, 2047])
def test_steps_done_anew_replace_the_old_without_a_trace(back: int) -> None:
    rng = np.random.default_rng(back)
    before, after = rng.normal(size=50_000), rng.normal(size=3000)
    series = series_of(before)
    series.forget_from(50_000 - back + 1)
    for step, value in enumerate(after.tolist(), 50_000 - back + 1):
        series.add(step, value)
    whole = series_of(np.concatenate([before[: 50_000 - back], after]))
    assert len(series) == len(whole)
    again, expected = series.thinned(), whole.thinned()
    mean = np.dot(np.diff([0, *again["x"]]), again["y"]) / again["x"][-1]
    assert mean == pytest.approx(np.dot(np.diff([0, *expected["x"]]), expected["y"]) / expected["x"][-1], abs=1e-6)
    assert max(again["high"]) == max(expected["high"]) and again["x"][-1] == expected["x"][-1]


def test_going_back_beyond_the_newest_drops_no_more_than_a_stretch() -> None:
    series = series_of(np.ones(300_000))
    series.forget_from(100_001)
    assert 100_000 - 300_000 / (POINTS / 2) <= len(series) <= 100_000
    series.forget_from(0)
    assert len(series) == 0 and series.thinned() == {"x": [], "y": []}
    series.add(1, 2.0)
    assert series.thinned()["y"] == [2.0]


def step_metrics(step: int, loss: float) -> StepMetrics:
    return StepMetrics(step, step / 100, loss, 1e-4, 1.0, 4, 4 * step, 0.1, 0.5)


def losses(series: RunSeries) -> list[tuple[float, float]]:
    series.update()
    thin = series.by_name["train/loss"].thinned()
    return [*zip(thin["x"], thin["y"], strict=True)]


def test_a_run_that_is_followed_is_a_run_that_is_read_whole(tmp_path: Path) -> None:
    """Records as the run writes them, with a restart from an older checkpoint, after which steps are done anew."""
    followed = RunSeries(tmp_path)
    with pytest.raises(FileNotFoundError):
        followed.update()
    expected: dict[int, float] = {}
    rng = random.Random(4)
    for resumed, last in ((None, 40), (20, 90), (90, 95), (60, 61)):
        with MetricsWriter(tmp_path, resumed, tensorboard=False) as writer:
            expected = {step: loss for step, loss in expected.items() if step <= (resumed or 0)}
            for step in range((resumed or 0) + 1, last + 1):
                expected[step] = round(rng.random(), 4)
                writer.step(step_metrics(step, expected[step]))
                if step % 10 == 0:
                    writer.validation(step, 0.5, {100: 0.25})
                if step % 7 == 0:
                    assert losses(followed) == [*expected.items()]
        assert losses(followed) == [*expected.items()] == losses(RunSeries(tmp_path))
        assert followed.by_name["validation/loss_t100"].thinned()["x"] == [*range(10, last + 1, 10)]
        assert followed.last["step"] == last


def test_records_that_go_back_within_a_file_replace_the_old(tmp_path: Path) -> None:
    lines = [{"kind": "train", "step": step, "loss": 1.0} for step in range(1, 9)]
    lines += [{"kind": "validation", "step": 8, "loss": 3.0}, {"kind": "train", "step": 8, "note": "no loss"}]
    lines += [{"kind": "train", "step": step, "loss": 2.0} for step in (5, 6)]
    lines += [{"kind": "validation", "step": 6, "loss": 4.0}, {"kind": "validation", "step": 6, "loss": 5.0}]
    (tmp_path / METRICS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    series = RunSeries(tmp_path)
    assert losses(series) == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert series.by_name["validation/loss"].thinned() == {"x": [6], "y": [5]}


def test_records_of_any_kind_cost_a_bounded_number_of_curves(tmp_path: Path) -> None:
    bad = ["[" * 100_000, "17", '{"kind": 3, "step": 1}', '{"kind": "train", "step": "1"}', "{", '{"kind": "train"}']
    bad += ['{"kind": "train", "step": 1, "loss": 1%s}' % ("0" * 400), '{"kind": "train", "step": NaN, "loss": 1}']
    many = [json.dumps({"kind": "train", "step": n, f"n{n}": 1.0, "loss": True}) for n in range(2, 2000)]
    blocks = [json.dumps({"kind": "train", "step": 3000, "grad_norm/unet.mid_block": 1.0, "loss": 0.5})]
    (tmp_path / METRICS_FILE).write_text("\n".join([*blocks[:0], *bad, *blocks, *many]) + "\n")
    series = RunSeries(tmp_path)
    assert losses(series) == [] or losses(series) == [(3000, 0.5)]
    assert len(series.by_name) <= 500 and "train/grad_norm/unet.mid_block" not in series.by_name


def test_the_hosts_numbers_over_hours(tmp_path: Path) -> None:
    host = HostSeries(tmp_path)
    host.update()
    assert not host.by_name
    lines = [{"time": 1e9 + 360 * i, "cards": [{"temperature_c": 60 + i, "uuid": "x"}], "free": 1} for i in range(11)]
    (tmp_path / "host.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    host.update()
    assert sorted(host.by_name) == ["cards.0.temperature_c", "free"]
    thin = host.by_name["cards.0.temperature_c"].thinned()
    assert thin["x"] == pytest.approx([i / 10 for i in range(11)]) and thin["y"] == [60 + i for i in range(11)]

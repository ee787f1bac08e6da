"""Shares by phase, who is slow, and what is said of it."""

import pytest

from trainer.measure.run_times import LATEST, RunTimes
from trainer.measure.step_clock import PHASES


def row(card_gib: float = 0.0, process_gib: float = 1.0, **seconds: float) -> list[float]:
    return [*(seconds.get(phase, 0.0) for phase in PHASES), card_gib, process_gib]


def times_of(*rows: list[float], steps: int = 3, exchange: str = "all-reduce", is_known: bool = True) -> RunTimes:
    times = RunTimes(PHASES, exchange, is_known=is_known)
    times.note([row(forward=100.0) for _ in rows])  # the first one, which compiles
    for _ in range(steps):
        times.note(rows)
    return times


WELL = row(forward=1.0, backward=2.0, exchange=0.2, optimizer=0.3, data=0.02)


def test_nothing_is_said_while_nothing_is_worth_it() -> None:
    times = times_of(WELL, WELL)
    shares = times.latest()
    assert shares is not None and times.waiting(shares) == ""
    assert shares.period_s == pytest.approx(3.52) and shares.mean["backward"] == pytest.approx(2 / 3.52)
    assert sum(shares.mean.values()) == pytest.approx(1.0)


def test_who_waits_waits_for_the_slowest_and_it_says_what_for() -> None:
    quick = row(forward=1.0, backward=1.0, exchange=6.0)
    late = row(forward=1.0, backward=1.0, data=5.5, exchange=0.5)
    times = times_of(quick, quick, late, quick)
    shares = times.latest()
    assert shares is not None
    assert times.waiting(shares) == "58 % all-reduce, 17 % data, rank 2 slowest (data)"  # (3 x 6 + 0.5) / 32, 5.5 / 32
    assert shares.busy_s == pytest.approx((2.0, 2.0, 7.5, 2.0)) and shares.late_by == pytest.approx(5.5 / 8)
    assert "busy by itself, by rank: 2, 2, 7.5, 2 s" in times.told(shares)


def test_slow_wires_are_nobodys_fault() -> None:
    each = row(forward=1.0, backward=1.0, exchange=3.0)
    times = times_of(each, row(forward=1.01, backward=1.0, exchange=2.99), exchange="exchange")
    shares = times.latest()
    assert shares is not None and times.waiting(shares) == "60 % exchange"


def test_one_worker_waits_for_data_and_checkpoints() -> None:
    times = times_of(row(forward=1.0, backward=1.0, data=1.4, save=0.6))
    shares = times.latest()
    assert shares is not None and times.waiting(shares) == "35 % data, 15 % a checkpoint"
    record = times.record(shares)
    assert not any(key.startswith(("slowest", "busy_s")) for key in record) and "vram_gib" not in record
    assert record["data"] == pytest.approx(0.35) and record["rss_gib"] == pytest.approx(1.0)


def test_what_is_not_known_is_not_told() -> None:
    each = row(forward=1.0, backward=5.0, exchange=0.01, card_gib=20.0)
    times = times_of(each, each, is_known=False)
    shares = times.latest()
    assert shares is not None and times.waiting(shares) == ""
    assert "how long workers wait for the all-reduce is not known here" in times.told(shares)
    record = times.record(shares)
    assert record["vram_gib"] == pytest.approx(20.0) and record.keys() & {"exchange", "slowest", "busy_s/0"} == set()


def test_a_record_is_of_the_steps_since_the_last_one() -> None:
    times = times_of(WELL, steps=LATEST + 10)
    assert times.take() is not None and times.take() is None
    times.note([row(data=1.0, process_gib=3.0)])
    taken = times.take()
    assert taken is not None and taken.mean["data"] == 1.0 and taken.process_gib == 3.0
    latest = times.latest()
    assert latest is not None and latest.mean["data"] < 0.05

"""Conditions are told once: by series of readings as a card gives them."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from trainer.host.alarms import Alarm, CardAlarms
from trainer.host.card_readings import Card


def told(series: Callable[[int], Card], seconds: int, alarms: CardAlarms | None = None, start: int = 0) -> list[str]:
    alarms = alarms or CardAlarms("card 1", hot_c=85)
    return [line for now in range(start, start + seconds, 5) for line in alarms.add(now, series(now))]


def test_an_alarm_waits_for_its_time_and_for_half_of_the_readings() -> None:
    alarm = Alarm(60.0)
    assert not any(alarm.begins(now, now % 15 == 0) for now in range(0, 300, 5))  # a third of the time
    assert [now for now in range(300, 400, 5) if alarm.begins(now, True)] != []
    assert alarm.is_on and not any(alarm.begins(now, now % 10 == 0) for now in range(400, 700, 5))
    assert alarm.is_on
    for now in range(700, 800, 5):
        alarm.begins(now, False)
    assert not alarm.is_on


def test_heat_is_told_once_until_the_card_has_cooled_down() -> None:
    def swinging(now: int) -> Card:
        return Card("GPU-1", temperature_c=86 if now % 10 else 84, power_w=347.6, slowdown_at_c=95)

    alarms = CardAlarms("card 1", hot_c=85)
    assert told(lambda _: Card("GPU-1", temperature_c=70), 100, alarms) == []
    (line,) = told(swinging, 600, alarms, 100)
    assert line.endswith("(launch.hot_c is 85, and slows down at 95); it takes 348 W")
    assert told(lambda _: Card("GPU-1", temperature_c=70), 100, alarms, 700) == []
    assert len(told(swinging, 100, alarms, 800)) == 1


def test_clocks_that_are_held_down_for_minutes() -> None:
    def card(now: int) -> Card:  # it idles at each fourth reading, between two steps
        return Card("GPU-1", clock_mhz=900, power_w=200.0, slowed_by=("idle",) if now % 20 == 0 else ("heat",))

    assert told(card, 200) == []
    (line,) = told(card, 2000)
    assert line == "card 1 has been slowed down by heat at 200 W for 5 minutes, its clock is 900 MHz"
    assert told(lambda _: Card("GPU-1", slowed_by=("idle",)), 2000) == []


def test_a_power_limit_is_told_where_it_costs_much_of_the_clock() -> None:
    alarms = CardAlarms("card 1", hot_c=85)
    limited = Card("GPU-1", clock_mhz=1700, power_w=350.0, slowed_by=("its power limit",))
    assert told(lambda now: limited if now else Card("GPU-1", clock_mhz=1995), 3000, alarms) == []
    (line,) = told(lambda _: replace(limited, clock_mhz=1300, power_w=200.0), 3000, alarms, 3000)
    assert line == "card 1 has been slowed down by its power limit at 200 W for 5 minutes, its clock is 1300 MHz"


def test_a_link_that_is_narrower_than_before_under_load() -> None:
    alarms = CardAlarms("card 1", hot_c=85)
    full = Card("GPU-1", pcie_generation=4, pcie_width=16)
    resting = Card("GPU-1", pcie_generation=1, pcie_width=16, slowed_by=("idle",))
    assert told(lambda now: full if now % 15 else resting, 300, alarms) == []
    narrow = Card("GPU-1", pcie_generation=4, pcie_width=8)
    (line,) = told(lambda _: narrow, 600, alarms, 300)
    assert "generation 4 x8, and was at 4 x16 before" in line
    assert told(lambda _: full, 600, alarms, 900) == []


def test_a_burst_of_replays_is_told_and_a_few_are_not() -> None:
    alarms = CardAlarms("card 1", hot_c=85)
    assert told(lambda now: Card("GPU-1", replays=now // 60), 600, alarms) == []
    assert not alarms.link_is_noisy
    (line,) = told(lambda now: Card("GPU-1", replays=10 + 10 * (now - 600)), 100, alarms, 600)
    assert "had to repeat" in line and alarms.link_is_noisy
    assert told(lambda now: Card("GPU-1", replays=1000), 200, alarms, 700) == []
    assert not alarms.link_is_noisy


def test_a_card_that_tells_nothing_has_no_alarms() -> None:
    assert told(lambda _: Card("GPU-1"), 1000) == []
    assert told(lambda _: Card("GPU-1", lost=True, temperature_c=200), 1000) == []


@pytest.mark.parametrize("every_s", [1, 5, 16, 30, 120, 600])
def test_what_lasts_is_told_however_far_apart_the_readings_are(every_s: int) -> None:
    bad = Card("GPU-1", temperature_c=95, slowed_by=("heat",), pcie_generation=4, pcie_width=4)
    good = Card("GPU-1", temperature_c=60, pcie_generation=4, pcie_width=16, replays=0)
    alarms, lines = CardAlarms("card 1", hot_c=85), []
    for now in range(0, 20 * max(every_s, 60), every_s):
        lines += alarms.add(now, replace(bad, replays=5 * now) if now > 5 * every_s else good)
    assert len(lines) == 4
    assert sum("packets" in line for line in lines) == sum("x4, and was at 4 x16" in line for line in lines) == 1
    assert sum("at 95 C" in line for line in lines) == sum("slowed down by heat" in line for line in lines) == 1

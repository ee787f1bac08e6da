"""The timeline of a step's phases: by the clock on the CPU, by events on a card."""

import time
from itertools import count

import pytest
import torch

from trainer.measure.step_clock import PHASES, STOPPED, StepClock, arriving

CPU = torch.device("cpu")


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is a second after the one before."""
    ticks = count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))


def told(clock: StepClock) -> dict[str, float]:
    return {phase: taken for phase, taken in clock.take().items() if taken}


def test_all_time_is_in_one_phase_or_a_pause(seconds: None) -> None:
    clock = StepClock(CPU)
    clock.mark("forward")
    assert told(clock) == {}  # it has not been started
    clock.start()
    for phase in ("data", "forward", "backward", "forward", None, "other"):
        clock.mark(phase)
    assert told(clock) == {"data": 1.0, "forward": 2.0, "backward": 1.0}
    clock.mark("save")  # what was on at the last call goes on
    assert told(clock) == {"other": 1.0}
    clock.stop()
    clock.mark("data")
    assert told(clock) == {} and clock.current is None and set(clock.take()) == set(PHASES)


def test_waiting_for_a_batch_and_encoding_it(seconds: None) -> None:
    clock = StepClock(CPU)
    clock.start()
    for batch in arriving(clock, [1, 2]):
        clock.mark("forward" if batch == 1 else "backward")
    clock.mark("optimizer")
    assert told(clock) == {"data": 3.0, "encode": 2.0, "forward": 1.0, "backward": 1.0}


def test_a_clock_that_stands_still_does_not_look_at_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("it has looked"))
    assert [*arriving(STOPPED, "ab")] == ["a", "b"]
    STOPPED.mark("forward")
    assert told(STOPPED) == {}


class Stream:
    """Stands for a card: what is given to it runs later, one after the other. Milliseconds, as CUDA tells them."""

    def __init__(self) -> None:
        self.given, self.ran = 0.0, 0.0
        self.events: list[Stream.Event] = []

    def event(self, *, enable_timing: bool) -> "Stream.Event":
        assert enable_timing
        self.events.append(Stream.Event(self))
        return self.events[-1]

    class Event:
        def __init__(self, stream: "Stream") -> None:
            self.stream, self.at = stream, -1.0

        def record(self) -> None:
            self.at = self.stream.given

        def elapsed_time(self, end: "Stream.Event") -> float:
            assert max(self.at, end.at) <= self.stream.ran, "it has not run yet, and CUDA would refuse"
            return end.at - self.at


def test_on_a_card_events_are_read_when_they_have_run_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait for the device: what comes after the last mark is told the next time."""
    stream = Stream()
    monkeypatch.setattr(torch.cuda, "Event", stream.event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: pytest.fail("it waits for the device"))
    clock = StepClock(torch.device("cuda:0"))
    clock.start()
    for _ in range(5):
        for phase, given in (("optimizer", 500.0), ("data", 0.0), ("forward", 1000.0), ("backward", 2000.0)):
            clock.mark(phase)
            stream.given += given
        clock.mark("exchange")
        stream.ran = stream.given  # the host reads the step's loss
        taken = told(clock)
        stream.given += 250.0
    assert taken == {"optimizer": 0.5, "forward": 1.0, "backward": 2.0, "exchange": 0.25}
    assert len(stream.events) <= 7

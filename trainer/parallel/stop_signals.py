"""Signals that ask this command to end, noted instead of dying of them."""

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

# Ctrl-C often arrives twice: from the terminal and from a wrapper that passes it on.
SAME_SIGNAL_S = 0.3


@dataclass
class StopSignals:
    """Stop signals that this process has received; repetitions within `SAME_SIGNAL_S` count once."""

    first: signal.Signals | None = None
    first_s: float = 0.0
    again: bool = False

    def note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.first_s = signal.Signals(number), now
        elif now - self.first_s > SAME_SIGNAL_S:
            self.again = True


@contextlib.contextmanager
def noted_signals() -> Iterator[StopSignals]:
    """Note SIGINT, SIGTERM and SIGHUP instead of dying of them; a signal that is ignored (nohup) stays ignored."""
    signals = StopSignals()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signals.note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)

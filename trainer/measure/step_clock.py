"""Where the time of a step goes: one timeline of phases, on a card by events that are read when they have long run.

At any moment one phase is on, or a pause. On the CPU marks are times; on a card they are events on the stream that
computes, so that an interval is what the card saw: work that the host does while the card is busy takes no time, and
what the card idles for counts.
"""

import time
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any, TypeVar

import torch

_Batch = TypeVar("_Batch")
PHASES: tuple[str, ...] = ("data", "encode", "copy", "forward", "backward", "exchange", "optimizer", "save", "other")
"""
data: waiting for a batch. encode: the VAE and the frozen text encoders. copy: noise is drawn, and all of it goes to the
device. forward, backward: the passes, with what is computed again. exchange: waiting for other workers' gradients,
weights and sums, with packing and unpacking. optimizer: norm, clipping, update, averages of the weights. save: what a
checkpoint lets the loop wait. other: records, judging, all else between steps.
"""


class StepClock:
    """Seconds by phase, from one `take` to the next. It stands still, and costs nothing, until `start`."""

    def __init__(self, device: torch.device) -> None:
        self.current: str | None = None
        """The phase that is on; None: a pause."""
        self._on_card, self._runs = device.type == "cuda", False
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._since_s = 0.0
        self._marks: list[tuple[str | None, Any]] = []
        self._free: list[Any] = []

    def start(self) -> None:
        """From now on, with a pause; what was before is forgotten."""
        self._sums = dict.fromkeys(PHASES, 0.0)
        self._marks.clear()
        self._runs, self.current = True, None
        self.mark(None)

    def stop(self) -> None:
        """Stand still."""
        self._runs, self.current = False, None

    def mark(self, phase: str | None) -> None:
        """What was on until now ends; `phase` begins, or a pause (None)."""
        if not self._runs:
            return
        if self._on_card:
            event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            now_s = time.perf_counter()
            if self.current is not None:
                self._sums[self.current] += now_s - self._since_s
            self._since_s = now_s
        self.current = phase

    def take(self) -> dict[str, float]:
        """Seconds of each phase since the last call, up to the last mark.

        On a card that mark must have run: the host has read something that was put on the stream after it. Nothing is
        waited for.
        """
        for (phase, begin), (_, end) in pairwise(self._marks):
            if phase is not None:
                self._sums[phase] += begin.elapsed_time(end) / 1e3
            self._free.append(begin)
        del self._marks[:-1]
        taken, self._sums = self._sums, dict.fromkeys(PHASES, 0.0)
        return taken


STOPPED = StepClock(torch.device("cpu"))
"""Of steps whose time nobody asks for; never started."""


def arriving(clock: StepClock, batches: Iterable[_Batch]) -> Iterator[_Batch]:
    """The batches as they come: what is waited for them is `data`; what is done with each next, `encode`."""
    waiting = iter(batches)
    while True:
        clock.mark("data")
        try:
            batch = next(waiting)
        except StopIteration:
            return
        clock.mark("encode")
        yield batch

"""How long each worker's forward passes take, told to all in the step's exchange, to find one that delays others."""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from trainer.faults import planned
from trainer.measure.phases import PhaseClock
from trainer.measure.stragglers import Stragglers
from trainer.train.step import StepParts

_log = logging.getLogger(__name__)


class Pace:
    """Of workers that exchange nothing in their forward passes; of others, each would show the slowest one's time."""

    def __init__(self, parts: StepParts, step: int) -> None:
        """`step`: that the run is at."""
        self._comm, self._around, self._step = parts.comm, parts.around_forward, step
        self._is_on = parts.strategy.sharing.kind == "ddp" and parts.comm.world > 1
        self._clock, self._stragglers = PhaseClock(parts.comm.device), Stragglers(parts.comm.world)

    def clocked(self, parts: StepParts) -> StepParts:
        """The parts, with forward passes whose time is taken."""
        return replace(parts, around_forward=self._forward) if self._is_on else parts

    @contextmanager
    def _forward(self) -> Iterator[None]:
        self._clock.mark("forward")
        if (seconds := planned("slow", self._comm.rank, self._step + 1)) is not None:
            time.sleep(float(seconds))
        with self._around():
            yield
        self._clock.mark(None)

    def tell(self) -> list[float]:
        """This worker's time of the step before, in its own place: to be summed over all workers."""
        if not self._is_on:
            return []
        # The step's loss has been read since, so that its forward passes have run.
        own = self._clock.seconds(wait=False).get("forward", 0.0)
        self._clock.clear()
        return [own if rank == self._comm.rank else 0.0 for rank in range(self._comm.world)]

    def after_step(self, told: Sequence[float], step: int) -> None:
        """What all have told; rank 0 says who is slow."""
        self._step = step
        if told and all(told) and self._comm.rank == 0:
            for line in self._stragglers.note(told):
                _log.warning("%s", line)

    def announce_end(self) -> None:
        """Say how long each worker took."""
        if self._comm.rank == 0 and (line := self._stragglers.told()):
            _log.info("%s", line)

"""What every step took, by phase and worker: told to all in the step's exchange, so that it costs no other.

A worker that waits for a slow one waits in the exchange. So who is slow is told by what each does by itself: the
forward passes, without the waits for gathered weights inside of them.
"""

import logging
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.measure.run_times import ROW_TAIL, Row
from trainer.measure.step_clock import PHASES
from trainer.measure.stragglers import Stragglers
from trainer.train.step import StepParts

_log = logging.getLogger(__name__)
_NUMBERS = len(PHASES) + ROW_TAIL  # of each worker
_MOST_NUMBERS = 512  # in one exchange; more workers tell of several steps together
_MEMORY_EVERY_S = 10.0
_GIB = 2**30
_FORWARD = PHASES.index("forward")


class Pace:
    """Runs the clock of a run's steps; each worker has one."""

    def __init__(self, parts: StepParts, step: int) -> None:
        """`step`: that the run is at."""
        self._comm, self.clock, self._step = parts.comm, parts.clock, step
        self._every = -(-parts.comm.world * _NUMBERS // _MOST_NUMBERS)
        self._sums, self._steps = dict.fromkeys(PHASES, 0.0), 0
        self._memory, self._memory_at_s = (0.0, 0.0), -_MEMORY_EVERY_S
        self._compares = parts.comm.world > 1 and (not parts.strategy.sharing.is_sharded or parts.exchange_is_timed)
        self.stragglers = Stragglers(parts.comm.world)
        self.clock.start()

    def tell(self) -> list[float]:
        """This worker's row in its own place: to be summed over all workers, when the step's passes are done."""
        for phase, seconds in self.clock.take().items():
            self._sums[phase] += seconds
        self._steps += 1
        if (self._step + 1) % self._every:
            return []
        told = [0.0] * (_NUMBERS * self._comm.world)
        own = [seconds / self._steps for seconds in self._sums.values()]
        self._sums, self._steps = dict.fromkeys(PHASES, 0.0), 0
        begin = _NUMBERS * self._comm.rank
        told[begin : begin + _NUMBERS] = [*own, *self._memory_gib()]
        return told

    def after_step(self, told: Sequence[float], step: int) -> list[Row]:
        """What all have told, by rank; nothing where it was not due. Rank 0 says who is slow."""
        self._step = step
        rows: list[Row] = [told[i : i + _NUMBERS] for i in range(0, len(told), _NUMBERS)]
        forward = [row[_FORWARD] for row in rows]
        if self._compares and self._comm.rank == 0 and rows and all(forward):
            for line in self.stragglers.note(forward):
                _log.warning("%s", line)
        return rows

    def announce_end(self) -> None:
        """Say how long each worker took."""
        self.clock.stop()
        if self._comm.rank == 0 and self._compares and (line := self.stragglers.told()):
            _log.info("%s", line)

    def _memory_gib(self) -> tuple[float, float]:
        """On the card, and of this process; looked at now and then."""
        now_s = time.monotonic()
        if now_s - self._memory_at_s >= _MEMORY_EVERY_S:
            device, self._memory_at_s = self._comm.device, now_s
            on_card = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
            self._memory = on_card / _GIB, _resident_bytes() / _GIB
        return self._memory


def _resident_bytes() -> int:
    """Of this process; 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * resource.getpagesize()

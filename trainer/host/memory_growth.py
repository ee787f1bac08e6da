"""Whether a worker's memory grows, and when the workers should start anew because of it. Functions of readings."""

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer.host.process_memory import HostMemory

SETTLED_AFTER_STEPS = 200  # by then every shape of batch has been seen, and what is kept for it is there
_LEVEL_OF = 3  # readings whose median is the level that a worker settled at
_KEPT = 120  # readings that the slope is taken from
_GIB = 1 << 30
_FEWEST_STEPS = 1000  # from which a slope is told
_TELL_HOURS = 72.0


@dataclass(frozen=True)
class RecycleRule:
    """When all workers save, end and start again.

    Attributes:
        grown_bytes: a worker holds so much more than when it had settled; 0: never for that.
        available_bytes: the host has less than this, and the workers have grown by a quarter of it; 0: never for that.
            What somebody else uses is not mended by a new start.
    """

    grown_bytes: int
    available_bytes: int


def slope(points: Sequence[tuple[float, float]]) -> float:
    """By Theil and Sen: the median of the slopes between all pairs, which a few outliers do not move."""
    slopes = [
        (y2 - y1) / (x2 - x1) for i, (x1, y1) in enumerate(points) for x2, y2 in points[i + 1 :] if x2 != x1
    ]  # fmt: skip
    return statistics.median(slopes) if slopes else 0.0


@dataclass
class MemoryGrowth:
    """What is known of one attempt's workers. `add` readings in the order of time."""

    rule: RecycleRule
    settled_after_steps: int = SETTLED_AFTER_STEPS
    _points: deque[tuple[float, int, HostMemory]] = field(default_factory=lambda: deque(maxlen=_KEPT))
    _settling: list[tuple[int, ...]] = field(default_factory=list)
    _stride: int = 1
    _seen: int = 0

    def add(self, now_s: float, steps_taken: int, memory: HostMemory, copies: int = 0) -> str | None:
        """Take a reading; returns why the workers should start anew, in words, or None.

        Args:
            steps_taken: since these workers were started.
            copies: bytes that a worker may hold while a checkpoint is written, and keep for the next one: no leak, and
                there again after a new start.
        """
        if steps_taken < self.settled_after_steps:
            return None
        if len(self._settling) < _LEVEL_OF:
            self._settling.append(memory.by_worker)
        self._keep(now_s, steps_taken, memory)
        grown = [bytes_ - copies for bytes_ in self._grown(memory)]
        return self._too_much(grown) or self._too_little_left(grown, memory)

    def _keep(self, now_s: float, steps_taken: int, memory: HostMemory) -> None:
        """Every reading at first, then ever fewer, so that the slope is one of the whole time."""
        if self._seen % self._stride == 0:
            if len(self._points) == _KEPT:
                every_second = list(self._points)[::2]
                self._points.clear()
                self._points.extend(every_second)
                self._stride *= 2
            self._points.append((now_s, steps_taken, memory))
        self._seen += 1

    def _grown(self, memory: HostMemory) -> list[float]:
        """Bytes of each worker beyond its level."""
        levels = [statistics.median(of_worker) for of_worker in zip(*self._settling, strict=True)]
        return [held - level for held, level in zip(memory.by_worker, levels, strict=True)]

    def _too_much(self, grown: list[float]) -> str | None:
        most = max(grown, default=0.0)
        if not self.rule.grown_bytes or most < self.rule.grown_bytes:
            return None
        return f"worker {grown.index(most)} has grown by {_told(most)}"

    def _too_little_left(self, grown: list[float], memory: HostMemory) -> str | None:
        limit, together = self.rule.available_bytes, sum(max(0.0, each) for each in grown)
        if not limit or memory.available >= limit or together < limit / 4:
            return None
        return f"the host has {_told(memory.available)} of memory left, and the workers have grown by {_told(together)}"

    def per_thousand_steps(self) -> list[float]:
        """Bytes that each worker grows by in 1,000 steps; empty before there is enough to tell by."""
        if len(self._points) < 10 or self._points[-1][1] == self._points[0][1]:
            return []
        workers = range(len(self._points[-1][2].by_worker))
        return [1000 * slope([(steps, m.by_worker[w]) for _, steps, m in self._points]) for w in workers]

    def warning(self) -> str | None:
        """In words, that the host's memory will not last for `_TELL_HOURS`, if it is the workers that fill it."""
        if len(self._points) < 30 or self._points[-1][1] - self._points[0][1] < _FEWEST_STEPS:
            return None
        per_s = slope([(now_s, sum(memory.by_worker)) for now_s, _, memory in self._points])
        hours = self._points[-1][2].available / per_s / 3600 if per_s > 0 else float("inf")
        if hours > _TELL_HOURS:
            return None
        return f"the workers' memory grows by {_told(per_s * 3600)} an hour: the host's is full in {hours:.0f} hours"


def _told(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / (1 << 20):.0f} MiB"

"""Which worker computes more slowly than the others, whom it holds up: a relative score of its forward passes.

A score, as in NVIDIA's resiliency extension, is the quickest worker's median time over the own; 1 is the quickest.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median, quantiles

LATEST = 64  # steps that are looked back on
SLOW, WELL_AGAIN = 0.8, 0.87


class Stragglers:
    """Forward times of the latest steps, by worker."""

    def __init__(self, world: int) -> None:
        self._times: list[deque[float]] = [deque(maxlen=LATEST) for _ in range(world)]
        self._told: set[int] = set()

    def note(self, seconds: Sequence[float]) -> list[str]:
        """The workers' times of a step, by rank; what is to be told: once when a worker is slow, once when no more."""
        for times, own in zip(self._times, seconds, strict=True):
            times.append(own)
        if len(self._times[0]) < LATEST:
            return []
        medians = [median(times) for times in self._times]
        lines = []
        for rank, own in enumerate(medians):
            score = min(medians) / own if own else 1.0
            if score < SLOW and rank not in self._told:
                self._told.add(rank)
                lines.append(
                    f"worker {rank} computes slowly: {1e3 * own:.0f} ms for the forward passes of a step, the quickest "
                    f"{1e3 * min(medians):.0f} ms (score {score:.2f}, over {LATEST} steps); all wait for it"
                )
            elif score > WELL_AGAIN and rank in self._told:
                self._told.discard(rank)
                lines.append(f"worker {rank} computes as fast as the others again (score {score:.2f})")
        return lines

    def slowest(self) -> tuple[int, float] | None:
        """The worker that is slowest, and its score; None while too few steps are known."""
        if len(self._times[0]) < LATEST:
            return None
        medians = [median(times) for times in self._times]
        most = max(medians)
        return medians.index(most), min(medians) / most if most else 1.0

    def told(self) -> str:
        """Median and 99th percentile of each worker, in words; empty while too few steps are known."""
        if len(self._times[0]) < LATEST:
            return ""
        each = [f"{1e3 * median(t):.0f}/{1e3 * quantiles(t, n=100)[98]:.0f}" for t in self._times]
        return f"forward passes of a step, median/p99 in ms by worker: {', '.join(each)}"

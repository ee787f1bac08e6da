"""How long the parts of a step take, and how much of its communication nothing hides."""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

Interval = tuple[float, float]


class PhaseClock:
    """Sums up the time between marks; on CUDA by events on the stream, so that nothing waits for the clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str | None, Any]] = []

    def mark(self, phase: str | None) -> None:
        """What ran until now ends; `phase` begins, or a pause."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def clear(self) -> None:
        """Forget all marks."""
        self._marks.clear()

    def seconds(self, *, wait: bool = True) -> dict[str, float]:
        """Of each phase, over all its times.

        Args:
            wait: for the device; else all that is marked must have run.
        """
        if wait and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        sums: defaultdict[str, float] = defaultdict(float)
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            if phase is not None:
                sums[phase] += end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1e3
        return dict(sums)


def exposed_s(events: Iterable[Any]) -> float:
    """Seconds in which the card's only running kernels were NCCL's.

    Args:
        events: of `torch.profiler`, of one process and card.
    """
    nccl: list[Interval] = []
    others: list[Interval] = []
    for event in events:
        if event.device_type != DeviceType.CUDA or event.is_user_annotation:
            continue
        kernels = nccl if "nccl" in event.name.lower() else others
        kernels.append((event.time_range.start / 1e6, event.time_range.end / 1e6))
    return covered(nccl + others) - covered(others)


def covered(intervals: Sequence[Interval]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total

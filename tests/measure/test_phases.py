"""Time by phase, and communication that nothing hides."""

import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from trainer.measure.phases import PhaseClock, covered, exposed_s


def test_the_clock_sums_each_phase_and_leaves_pauses_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter((0.0, 1.0, 4.0, 9.0, 10.0, 13.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    clock = PhaseClock(torch.device("cpu"))
    for _ in range(2):
        for phase in ("forward", "backward", None):
            clock.mark(phase)
    assert clock.seconds() == {"forward": 2.0, "backward": 6.0}
    clock.clear()
    assert clock.seconds() == {}


@pytest.mark.parametrize(
    ("intervals", "length"),
    [([], 0), ([(1, 3)], 2), ([(1, 3), (2, 5)], 4), ([(4, 5), (1, 2)], 2), ([(1, 9), (2, 3)], 8)],
)
def test_union_of_intervals(intervals: list[tuple[float, float]], length: float) -> None:
    assert covered(intervals) == length


@dataclass
class Kernel:
    """As `torch.profiler` tells of one; microseconds."""

    name: str
    begin: float
    end: float
    device_type: DeviceType = DeviceType.CUDA
    is_user_annotation: bool = False

    @property
    def time_range(self) -> SimpleNamespace:
        return SimpleNamespace(start=self.begin, end=self.end)


def test_exposed_is_what_no_other_kernel_covers() -> None:
    events = [
        Kernel("gemm", 0e6, 4e6),
        Kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", 3e6, 6e6),  # 2 s alone
        Kernel("gemm", 6e6, 8e6),
        Kernel("ncclDevKernel_AllGather", 7e6, 8e6),  # hidden
        Kernel("nccl:all_reduce", 0e6, 20e6, is_user_annotation=True),
        Kernel("c10d::allreduce_", 0e6, 30e6, device_type=DeviceType.CPU),
    ]
    assert exposed_s(events) == pytest.approx(2.0)

"""Memory of real processes, and what follows from series of readings."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.host.memory_growth import MemoryGrowth, RecycleRule, slope
from trainer.host.process_memory import HostMemory, read_memory

MIB, GIB = 1 << 20, 1 << 30
HOLDER = """
import subprocess, sys
held = b"1" * (60 << 20)
child = "held = b'1' * (40 << 20); print(flush=True); input()"
with subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as reader:
    reader.stdout.readline()
    print(flush=True)
    input()
    reader.communicate(b"\\n")
"""


def test_a_worker_is_counted_with_what_it_has_started() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        memory = read_memory([process.pid, 2**22 + 1])
        process.communicate(b"\n")
    assert memory is not None and 0 < memory.available <= memory.total
    assert 100 * MIB <= memory.by_worker[0] <= 130 * MIB and memory.by_worker[1] == 0


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir(), cgroup.mkdir()
    assert read_memory([], proc, cgroup) is None
    (proc / "meminfo").write_text("MemTotal: 100000 kB\nMemAvailable: 90000 kB\nHugePages_Total: 0\n")
    assert read_memory([], proc, cgroup) == HostMemory(90000 * 1024, 100000 * 1024, ())
    (cgroup / "memory.max").write_text("50000000\n")
    (cgroup / "memory.current").write_text("40000000\n")
    (cgroup / "memory.stat").write_text("anon 1\nactive_file 3000000\ninactive_file 4000000\n")
    assert read_memory([], proc, cgroup) == HostMemory(17_000_000, 50_000_000, ())
    (cgroup / "memory.max").write_text("max\n")
    assert read_memory([], proc, cgroup) == HostMemory(90000 * 1024, 100000 * 1024, ())


def test_the_slope_is_not_moved_by_outliers() -> None:
    noise = random.Random(1)
    points = [(float(x), 3.0 * x + noise.uniform(-1, 1)) for x in range(60)]
    points[7], points[30] = (7.0, 1e6), (30.0, -1e6)
    assert slope(points) == pytest.approx(3.0, abs=0.05)
    assert slope([]) == slope([(1.0, 2.0)]) == slope([(1.0, 2.0), (1.0, 5.0)]) == 0.0


def after(growth: MemoryGrowth, step: int, held: tuple[int, ...], available: int = 100 * GIB) -> str | None:
    return growth.add(step * 5.0, step, HostMemory(available, 128 * GIB, held))


def test_a_leak_asks_for_a_new_start_and_a_high_level_does_not() -> None:
    growth = MemoryGrowth(RecycleRule(200 * MIB, 0))
    assert all(after(growth, step, (step * GIB, 0)) is None for step in range(0, 200, 5))  # until it has settled
    asked = [step for step in range(200, 1000) if after(growth, step, (30 * GIB, 30 * GIB + step * MIB))]
    assert asked[0] == 401 and asked[-1] == 999  # 200 MiB above the second of three first readings
    assert after(growth, 1000, (0, 230 * MIB + 30 * GIB + 201 * MIB)) == "worker 1 has grown by 230 MiB"
    assert growth.per_thousand_steps() == pytest.approx([0.0, 1000 * MIB], rel=1e-3)
    never = MemoryGrowth(RecycleRule(0, 0))
    assert all(after(never, step, (step * GIB,), 0) is None for step in range(500))


def test_little_memory_asks_for_a_new_start_only_where_the_workers_have_grown() -> None:
    growth = MemoryGrowth(RecycleRule(0, 2 * GIB))
    for step in range(200, 210):
        assert after(growth, step, (10 * GIB, 10 * GIB), 1 * GIB) is None  # somebody else holds it
    why = after(growth, 210, (10 * GIB + 300 * MIB, 10 * GIB + 300 * MIB), 1 * GIB)
    assert why == "the host has 1.0 GiB of memory left, and the workers have grown by 600 MiB"
    assert after(growth, 211, (11 * GIB, 11 * GIB), 3 * GIB) is None


def test_a_slow_leak_is_foretold() -> None:
    growth = MemoryGrowth(RecycleRule(0, 0))
    for step in range(200, 3000, 10):  # 1 MiB a step, 5 s a step: 720 MiB an hour
        after(growth, step, (step * MIB,), 20 * GIB)
    assert growth.warning() == "the workers' memory grows by 720 MiB an hour: the host's is full in 28 hours"
    flat = MemoryGrowth(RecycleRule(0, 0))
    for step in range(200, 3000, 10):
        after(flat, step, (GIB,), 20 * GIB)
    assert flat.warning() is None


def test_copies_for_a_checkpoint_are_no_leak() -> None:
    """Without them, a run whose share of a checkpoint is larger than the limit would start anew at each."""
    growth = MemoryGrowth(RecycleRule(8 * GIB, 2 * GIB))
    for step in range(200, 210):
        assert growth.add(step * 5.0, step, HostMemory(99 * GIB, 128 * GIB, (GIB,)), 10 * GIB) is None
    for step in range(210, 300):  # the first save, and what is kept of it
        assert growth.add(step * 5.0, step, HostMemory(GIB, 128 * GIB, (11 * GIB,)), 10 * GIB) is None
    why = growth.add(1500.0, 300, HostMemory(99 * GIB, 128 * GIB, (20 * GIB,)), 10 * GIB)
    assert why == "worker 0 has grown by 9.0 GiB"

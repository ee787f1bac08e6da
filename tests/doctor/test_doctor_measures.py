"""Disks, memory and exchanges of this machine, measured for real, in small."""

import os
from pathlib import Path

import pytest

from trainer.doctor import disk_facts
from trainer.doctor.disk_facts import measure_flushing, measure_reading, percentile, read_place
from trainer.doctor.exchange import MIB, facts_from, measure_exchange
from trainer.doctor.memory_speed import measure_memory

ROOT = str(Path(__file__).parents[2])


def test_a_folder_is_read_and_flushed_and_nothing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_facts, "SAMPLE_BYTES", 8 * MIB)
    said: list[str] = []
    read, flush = measure_reading(tmp_path, said.append), measure_flushing(tmp_path, said.append)
    assert read is not None and flush is not None
    assert said == ["writing what will be read", "reading in order", "reading at random", "flushing", "writing"]
    assert 1e6 < read.sequential < 1e12 and read.reads_per_s > 1 and 0 < read.slowest_s < 60
    assert 1e5 < flush.written < 1e12 and 0 < flush.median_s <= flush.slowest_s and flush.flushes >= 5
    assert [*tmp_path.iterdir()] == []
    # A file that lies there is read instead, and stays as it is.
    content = os.urandom(9 * MIB)
    (tmp_path / "shard.tar").write_bytes(content)
    said.clear()
    assert measure_reading(tmp_path, said.append) is not None and said[0] == "reading in order"
    assert (tmp_path / "shard.tar").read_bytes() == content


def test_a_disk_without_room_is_not_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_facts, "SAMPLE_BYTES", 1 << 60)
    assert measure_reading(tmp_path) is None and measure_flushing(tmp_path) is None


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    place = read_place(tmp_path / "runs" / "x")
    assert place.folder == tmp_path / "runs" / "x" and place.measured == tmp_path
    assert place.free == pytest.approx(os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize, rel=0.1)
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    above = [words for words in mounts if tmp_path.is_relative_to(words[1])]
    assert place.filesystem == max(above, key=lambda words: len(words[1]))[2]


@pytest.mark.e2e
def test_memory_is_copied() -> None:
    found = measure_memory(2)
    assert found.threads == 2 and 1e8 < found.one_thread < 1e12 and 1e8 < found.all_threads < 1e13


@pytest.mark.e2e
def test_workers_exchange_over_gloo() -> None:
    said: list[str] = []
    env = {**os.environ, "PYTHONPATH": ROOT}
    found = measure_exchange(2, gpu=False, env=env, sizes=(MIB, 2 * MIB), tick=said.append)
    assert found.error == "" and found.backend == "gloo" and found.workers == 2
    assert [each.size for each in found.sizes] == [MIB, 2 * MIB]
    for each in found.sizes:
        assert each.times >= 5 and 0 < each.median_s <= each.slowest_s
        assert each.bus_bytes_per_s == pytest.approx(each.size / each.median_s)  # 2 (2 - 1) / 2 of it
    assert said[-1] == "all-reduce of 2 MiB"


def test_one_worker_exchanges_nothing_and_a_hang_ends() -> None:
    env = {**os.environ, "PYTHONPATH": ROOT}
    alone = measure_exchange(1, gpu=False, env=env)
    assert (alone.sizes, alone.error) == ((), "")
    late = measure_exchange(2, gpu=False, env=env, limit_s=0.5)
    assert "no end after 0 s, while starting" in late.error


def test_what_workers_tell_is_taken_by_the_slowest() -> None:
    times = [[0.001] * 98 + [0.001, 0.0031], [0.0005] * 98 + [0.0009, 0.0001]]
    record = {"sizes": [[4 * MIB, times]], "cards": [], "copies": None, "nccl": ""}
    (found,) = facts_from(record, 2, "gloo").sizes
    assert (found.times, found.median_s, found.slowest_s, found.stalls) == (100, 0.001, 0.001, 1)
    assert percentile([3, 1, 2], 50) == 2 and percentile([3, 1, 2], 99) == 3 and percentile([], 50) == 0

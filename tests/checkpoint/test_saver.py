"""Saving beside the training: who writes what, what it costs, and what a failing disk does."""

import errno
import os
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoint.odd_tensors import odd_tensors
from trainer.checkpoint import pieces
from trainer.checkpoint.manifest import find_damage
from trainer.checkpoint.saver import Folder, Saver, missing_room, save_now
from trainer.checkpoint.share_of_save import NotFinite
from trainer.checkpoint.write import TensorFile
from trainer.parallel.local_shard import Held, held

CPU = torch.device("cpu")
FILE = "unet/weights.safetensors"


def whole(tensors: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Held]:
    """As in DDP: everybody has everything."""
    return {name: held(tensor) for name, tensor in tensors.items()}


def by_rows(tensors: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Held]:
    """As in FSDP2: rows in chunks, of which the last workers may have none; scalars on all."""

    def share(tensor: Tensor) -> Held:
        if not tensor.ndim:
            return held(tensor)
        rows = -(-len(tensor) // world)
        first = min(rank * rows, len(tensor))
        return Held(tensor[first : first + rows], first, tuple(tensor.shape), True, tensor.dtype)

    return {name: share(tensor) for name, tensor in tensors.items()}


def by_groups(tensors: Mapping[str, Tensor], rank: int, world: int) -> dict[str, Held]:
    """Rows as above within a group of workers, of which there are two or three; the same rows in each."""
    replicas = next((count for count in (2, 3) if world % count == 0), 1)
    shares, within = by_rows(tensors, rank % (world // replicas), world // replicas), world // replicas
    return {
        name: each._replace(holders=tuple(range(rank % within, world, within))) if each.is_share else each
        for name, each in shares.items()
    }


def save_together(savers: Sequence[Saver], folders: Sequence[Folder]) -> list[Exception | None]:
    """What several workers do, in one process; the reasons for which each gave up."""
    for saver, folder in zip(savers, folders, strict=True):
        saver.begin([folder])
    reasons: list[Exception | None] = []
    while savers[0].phase != "idle":
        flags = [saver.flags() for saver in savers]
        sums = [sum(column) for column in zip(*flags, strict=True)]
        reasons = [saver.after_exchange(*sums) for saver in savers]
    return reasons


@pytest.mark.parametrize(
    ("cut", "world"),
    [
        *((cut, world) for cut in (whole, by_rows) for world in (1, 2, 3, 4, 7)),
        *((by_groups, world) for world in (4, 6, 9)),
    ],
)
def test_the_files_do_not_depend_on_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int, cut: Callable[..., dict[str, Held]]
) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 10)  # so that tensors take several
    tensors = odd_tensors()
    savers = [Saver(rank, world, "token", CPU, staging_bytes=4 << 10) for rank in range(world)]
    folders = [
        Folder(tmp_path / "step-00000007", [TensorFile(FILE, cut(tensors, rank, world), {"config.json": "{}"})], {})
        for rank in range(world)
    ]
    assert save_together(savers, folders) == [None] * world
    assert find_damage(tmp_path / "step-00000007") is None
    found = load_file(tmp_path / "step-00000007" / FILE)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    save_now(Folder(tmp_path / "alone", [TensorFile(FILE, whole(tensors, 0, 1), {})], {}))
    assert (tmp_path / "alone" / FILE).read_bytes() == (tmp_path / "step-00000007" / FILE).read_bytes()


def test_replicas_write_each_byte_once() -> None:
    tensors, world = {name: tensor for name, tensor in odd_tensors().items() if tensor.ndim}, 4
    files = [TensorFile(FILE, by_groups(tensors, rank, world), {}) for rank in range(world)]
    written = [pieces.bytes_of([pieces.lay_out(file, rank, range(world))]) for rank, file in enumerate(files)]
    assert sum(written) == sum(tensor.nbytes for tensor in tensors.values())
    assert max(written) < 0.3 * sum(written)


@pytest.mark.parametrize(("world", "each"), [(4, 2), (6, 3), (8, 4), (12, 4)])
def test_replicas_write_each_byte_once_on_each_disk(world: int, each: int) -> None:
    """A group within a host, two in one, and groups that begin on one host and end on another."""
    tensors = {name: tensor for name, tensor in odd_tensors().items() if tensor.ndim}
    files = [TensorFile(FILE, by_groups(tensors, rank, world), {}) for rank in range(world)]
    for first in range(0, world, each):
        disk = range(first, first + each)
        layouts = [pieces.lay_out(files[rank], rank, disk) for rank in disk]
        pieces_of_all = sorted((p.offset, p.num_bytes) for layout in layouts for p in layout.pieces)
        ends = [offset + size for offset, size in pieces_of_all]
        assert all(end <= offset for end, (offset, _) in zip(ends, pieces_of_all[1:], strict=False))
        if each >= world // 2:  # all rows are there
            assert sum(size for _, size in pieces_of_all) == sum(tensor.nbytes for tensor in tensors.values())


def test_weights_may_change_when_they_are_copied(tmp_path: Path) -> None:
    weights, told = torch.ones(1 << 20), []
    saver = Saver(0, 1, "token", CPU, staging_bytes=None)
    file = TensorFile(FILE, {"weight": held(weights)}, {})
    saver.begin([Folder(tmp_path / "step", [file], {}, lambda: told.append("published"))])
    saver.wait_copied()
    weights.fill_(2.0)
    assert saver.finish(list) is None and told == ["published"]
    assert torch.equal(load_file(tmp_path / "step" / FILE)["weight"], torch.ones(1 << 20))


def test_the_copies_are_bounded(tmp_path: Path) -> None:
    weights = torch.ones(48 << 20)  # 192 MiB

    def save(name: str, tensor: torch.Tensor) -> None:
        saver = Saver(0, 1, "token", CPU, staging_bytes=32 << 20)
        saver.begin([Folder(tmp_path / name, [TensorFile(FILE, {"weight": held(tensor)}, {})], {})])
        assert saver.finish(list) is None

    save("small", weights[:1])  # what the first save of a process imports and begins is not what is asked here
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = _peak_mib()
    save("step", weights)
    assert _peak_mib() - before < 32 + 16, "32 MiB of copies, and a manifest that is read in pieces"
    assert find_damage(tmp_path / "step") is None


def _peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


def test_one_workers_failing_disk_gives_up_for_all_and_leaves_nothing(tmp_path: Path) -> None:
    tensors, place, gone = odd_tensors(), tmp_path / "step", tmp_path / "gone"
    gone.write_text("a file where a folder was")
    savers = [Saver(rank, 3, "token", CPU, staging_bytes=None) for rank in range(3)]
    paths = [place, gone / "step", place]
    folders = [Folder(p, [TensorFile(FILE, whole(tensors, r, 3), {})], {}) for r, p in enumerate(paths)]
    reasons = save_together(savers, folders)
    assert isinstance(reasons[1], NotADirectoryError)
    assert str(reasons[0]) == str(reasons[2]) == "[Errno 5] another worker could not write its share; its log says why"
    assert [path.name for path in tmp_path.iterdir()] == ["gone"]
    folders = [Folder(place, [TensorFile(FILE, whole(tensors, r, 3), {})], {}) for r in range(3)]
    assert save_together(savers, folders) == [None] * 3
    assert find_damage(place) is None


def test_one_workers_nan_is_one_for_all(tmp_path: Path) -> None:
    """They have to decide alike whether another disk would help."""
    tensors = {"weight": torch.ones(8, 4)}
    savers = [Saver(rank, 2, "token", CPU, staging_bytes=None) for rank in range(2)]
    files = [TensorFile(FILE, by_rows(tensors, rank, 2), {}) for rank in range(2)]
    tensors["weight"][6, 1] = float("nan")
    reasons = save_together(savers, [Folder(tmp_path / "step", [file], {}) for file in files])
    assert isinstance(reasons[1], NotFinite) and str(reasons[1]) == f"{FILE}: weight holds NaN or infinity"
    assert isinstance(reasons[0], NotFinite) and list(tmp_path.iterdir()) == []


def test_a_write_that_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    big = TensorFile(FILE, {"weight": held(torch.zeros(48 << 20))}, {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save_now(Folder(tmp_path / "step", [big], {}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_waits_for_a_slow_disk_are_told_of_as_long_as_bytes_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And workers meet in exchanges meanwhile, so that none of those waits for longer than its time-out."""
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 10)
    monkeypatch.setattr("trainer.checkpoint.saver._LOOK_S", 0.05)
    monkeypatch.setattr("trainer.checkpoint.saver._EXCHANGE_EVERY_S", 0.2)
    write = os.pwrite

    def slow(descriptor: int, data: memoryview, offset: int) -> int:
        time.sleep(0.02)
        return write(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", slow)
    alive, exchanges = list[float](), list[float]()

    def exchange(values: list[float]) -> list[float]:
        exchanges.append(time.monotonic())
        return values

    saver = Saver(0, 1, "t", CPU, staging_bytes=2 << 10)
    saver.begin([Folder(tmp_path / "step-1", [TensorFile(FILE, whole(odd_tensors(), 0, 1), {})], {})])
    began = time.monotonic()
    saver.wait_copied(lambda: alive.append(time.monotonic()))
    took = time.monotonic() - began
    assert took > 0.3 and len(alive) >= 3, "copies had to wait for room"
    assert saver.finish(exchange, lambda: None) is None and len(exchanges) >= 2
    assert find_damage(tmp_path / "step-1") is None


def test_no_room_is_asked_before_anybody_writes(tmp_path: Path) -> None:
    file = TensorFile(FILE, whole(odd_tensors(), 0, 1), {})
    assert missing_room([Folder(tmp_path / "a" / "step-1", [file], {})]) == ""
    huge = {"huge": Held(torch.zeros(1, 4), 0, (1 << 48, 4), True, torch.float32)}
    folder = Folder(tmp_path / "b" / "step-1", [TensorFile(FILE, huge, {})], {})
    told = missing_room([folder])
    assert told.startswith("needs 4,5")
    savers = [Saver(rank, 2, "t", CPU, staging_bytes=None) for rank in range(2)]
    for saver in savers:
        saver.begin([folder], no_room=told)
        saver.wait_copied()
    sums = [sum(values) for values in zip(*(saver.flags() for saver in savers), strict=True)]
    for saver in savers:
        reason = saver.after_exchange(*sums)
        assert isinstance(reason, OSError) and reason.errno == errno.ENOSPC and saver.phase == "idle"
    assert not (tmp_path / "b").exists()


def test_a_disk_that_is_gone_is_a_save_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing that one worker raises while the others wait for it."""

    def gone(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("shutil.disk_usage", gone)
    file = TensorFile(FILE, whole(odd_tensors(), 0, 1), {})
    assert missing_room([Folder(tmp_path / "a" / "step-1", [file], {})]) == f"{tmp_path}: Input/output error"

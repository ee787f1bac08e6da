"""Bytes and files from one worker to another, beside all other exchanges."""

import errno
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.disks.run_disks import Disks

PIECES, FILES = 1, 2
"""Two ways for two threads: pieces of a save, and files."""
_BLOCK = 16 << 20


def begin_send(disks: Disks, data: Tensor, rank: int, way: int) -> dist.Work:
    """Start to send bytes, which must stay as they are until its `wait` returns.

    Raises:
        RuntimeError: the other worker is gone.
    """
    work = dist.isend(data, rank, group=disks.group, tag=way)
    assert work is not None
    return work


def receive(disks: Disks, data: Tensor, rank: int, way: int) -> None:
    """Fill `data` with as many bytes, which the other worker sends.

    Raises:
        RuntimeError: it is gone.
    """
    dist.recv(data, rank, group=disks.group, tag=way)


def send_files(disks: Disks, folder: Path, names: Sequence[str], rank: int) -> None:
    """Send files of a folder to another worker, which calls `receive_files`; their names may hold folders.

    Raises:
        OSError: one cannot be read; the other worker has got something else in its place.
    """
    failure: OSError | None = None
    sizes = {name: _size_of(folder / name) for name in names}
    listing = torch.frombuffer(bytearray(json.dumps(sizes).encode()), dtype=torch.uint8)
    begin_send(disks, torch.tensor([len(listing)]), rank, FILES).wait()
    begin_send(disks, listing, rank, FILES).wait()
    for name, size in sizes.items():
        try:
            content = (folder / name).open("rb")
        except OSError as error:
            content, failure = io.BytesIO(), failure or error
        with content:
            for num_bytes in _blocks(size):
                block = bytearray(num_bytes)
                try:
                    if content.readinto(block) != num_bytes:
                        failure = failure or OSError(errno.EIO, "the file became shorter", str(folder / name))
                except OSError as error:
                    failure = failure or error
                begin_send(disks, torch.frombuffer(block, dtype=torch.uint8), rank, FILES).wait()
    if failure is not None:
        raise failure


def receive_files(disks: Disks, folder: Path, rank: int) -> int:
    """Write the files that another worker sends into a folder, to the disk; returns how many bytes they have.

    Raises:
        OSError: one cannot be written. All has been received then: nobody waits for this worker.
    """
    length = torch.zeros(1, dtype=torch.int64)
    receive(disks, length, rank, FILES)
    listing = torch.zeros(int(length), dtype=torch.uint8)
    receive(disks, listing, rank, FILES)
    sizes: dict[str, int] = json.loads(listing.numpy().tobytes())
    failure: OSError | None = None
    for name, size in sizes.items():
        blocks = (_received(disks, num_bytes, rank) for num_bytes in _blocks(size))
        try:
            _write(folder, name, blocks)
        except OSError as error:
            failure = failure or error
            for _ in blocks:
                pass
    if failure is not None:
        raise failure
    return sum(sizes.values())


def collect_files(disks: Disks, folder: Path, names: Sequence[str]) -> None:
    """Bring files that workers have written on other disks to the first one, into `folder`, which each disk has.

    All workers call it; `names`: of those that this worker has written there.

    Raises:
        OSError: one cannot be read or written; nobody waits for this worker then.
    """
    if disks.mine:
        send_files(disks, folder, names, 0)
    elif disks.comm.rank == 0:
        reasons = [
            _reason(lambda sender=rank: receive_files(disks, folder, sender))
            for rank in range(disks.workers_each, disks.comm.world)
        ]
        if failures := [reason for reason in reasons if reason is not None]:
            raise failures[0]


def _reason(work: Callable[[], object]) -> OSError | None:
    """Why it could not be done, if it could not."""
    try:
        work()
    except OSError as error:
        return error
    return None


def _size_of(path: Path) -> int:
    """Of a file; 0 of one that is not there, which opening it will tell."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _blocks(size: int) -> Iterator[int]:
    """A file's bytes in blocks of a bounded size."""
    return (min(_BLOCK, size - begin) for begin in range(0, size, _BLOCK))


def _received(disks: Disks, num_bytes: int, rank: int) -> Tensor:
    block = torch.empty(num_bytes, dtype=torch.uint8)
    receive(disks, block, rank, FILES)
    return block


def _write(folder: Path, name: str, blocks: Iterator[Tensor]) -> None:
    if (place := PurePosixPath(name)).is_absolute() or ".." in place.parts:
        raise OSError(errno.EPERM, "not a file of a folder", name)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for block in blocks:
            file.write(block.numpy().data)
        file.flush()
        os.fsync(file.fileno())

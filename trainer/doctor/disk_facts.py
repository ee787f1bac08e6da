"""What a folder's disk is, and how fast it reads, writes and flushes. Nothing that is written has a name or stays."""

import errno
import mmap
import os
import random
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from trainer.doctor.kernel_files import number_of, text_of

_MIB = 1 << 20
SAMPLE_BYTES = 256 * _MIB
CHUNK_BYTES = 4 * _MIB
ROW_BYTES = 128 * 1024  # a latent of 1024 x 1024 px in bf16 or fp16: 4 x 128 x 128 numbers of two bytes
READERS = 4  # reads that wait at once, as of reader processes
_SEQUENTIAL_S, _RANDOM_S, _WRITE_S, _FLUSH_S = 3.0, 2.0, 3.0, 2.0
_FEWEST_FLUSHES, _MOST_FLUSHES = 5, 100
_SPARE = 4  # times the sample must be free before it is written
_MOST_LOOKED_AT = 20_000
_ESCAPES = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True)
class PlaceFacts:
    """A folder's disk.

    Attributes:
        folder: that was asked for; `measured` is the nearest one above it that is there.
        filesystem: such as `ext4`; "" where the kernel does not tell.
        rotates: whether it is a hard disk; None: no disk of this host, a virtual one, or not known.
        free: bytes that this user may still write.
    """

    folder: Path
    measured: Path
    filesystem: str
    rotates: bool | None
    free: int


@dataclass(frozen=True)
class ReadFacts:
    """How fast data are read, past the host's cache.

    Attributes:
        sequential: bytes a second.
        reads_per_s: reads of `ROW_BYTES` at random places, `READERS` of them at once.
        slowest_s: the time that 99 of 100 of these keep within.
        is_cached: the file system read through the host's cache, from which it was asked to drop the file before.
    """

    sequential: float
    reads_per_s: float
    slowest_s: float
    is_cached: bool


@dataclass(frozen=True)
class FlushFacts:
    """How fast what is written is safe.

    Attributes:
        written: bytes a second, the flush at the end counted in.
        median_s, slowest_s: of small appends that are flushed one by one, the median and the 99th percentile.
        flushes: how many.
    """

    written: float
    median_s: float
    slowest_s: float
    flushes: int


def read_place(folder: Path, root: Path = Path("/")) -> PlaceFacts:
    """The disk of a folder that may not be there yet.

    Raises:
        OSError: the disk does not answer.
    """
    place = folder.absolute()
    while not place.is_dir() and place != place.parent:
        place = place.parent
    found = os.statvfs(place)
    device = place.stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    block = root / "sys" / "dev" / "block" / number
    # A partition has its disk's properties in the folder above. A virtual disk does not know what is below it.
    disk = block.resolve().parent if (block / "partition").exists() else block.resolve()
    rotates = None if disk.name.startswith(("vd", "xvd")) else number_of(disk / "queue" / "rotational")
    return PlaceFacts(
        folder,
        place,
        _filesystem(place, number, root),
        None if rotates is None else bool(rotates),
        found.f_bavail * found.f_frsize,
    )


def _filesystem(place: Path, number: str, root: Path) -> str:
    """By /proc/self/mountinfo, which proc(5) describes: the last mount of the folder's device that is above it."""
    kinds = [("", "")]
    for line in (text_of(root / "proc" / "self" / "mountinfo") or "").splitlines():
        before, _, after = line.partition(" - ")
        words = before.split()
        if len(words) > 4 and words[2] == number:
            point = _ESCAPES.sub(lambda match: chr(int(match.group(1), 8)), words[4])
            if place.is_relative_to(point):
                kinds.append((point, after.split()[0]))
    return max(kinds, key=lambda kind: len(kind[0]))[1]


def measure_reading(folder: Path, tick: Callable[[str], None] = lambda told: None) -> ReadFacts | None:
    """How fast files of the folder are read: the largest that lie in it, or one that is written for this.

    Args:
        folder: one that is there.
        tick: told what is being done.
    Returns:
        None where there is too little to read and nothing may be written.
    Raises:
        OSError: the disk does not answer.
    """
    with _sample(folder, tick) as fd:
        if fd is None:
            return None
        size = min(os.fstat(fd).st_size, SAMPLE_BYTES) // CHUNK_BYTES * CHUNK_BYTES
        direct, is_cached = _direct(fd)
        try:
            _forget(fd)
            tick("reading in order")
            sequential = _read_in_order(direct, size)
            _forget(fd)
            tick("reading at random")
            times, took_s = _read_at_random(direct, size)
        finally:
            os.close(direct)
    return ReadFacts(sequential, len(times) / took_s, percentile(times, 99), is_cached)


@contextmanager
def _sample(folder: Path, tick: Callable[[str], None]) -> Iterator[int | None]:
    """A file of some size, opened: one of the folder's own, else one without a name."""
    if (largest := _largest_file(folder)) is not None:
        fd = os.open(largest, os.O_RDONLY)
        try:
            yield fd
        finally:
            os.close(fd)
        return
    if os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize < _SPARE * SAMPLE_BYTES:
        yield None
        return
    if (file := _nameless(folder)) is None:
        yield None
        return
    with file:
        tick("writing what will be read")
        _write_until(file.fileno(), SAMPLE_BYTES, time.monotonic() + 3 * _WRITE_S)
        yield file.fileno()


def _nameless(folder: Path) -> IO[bytes] | None:
    """A file that is gone as soon as it is closed; None where none may be made."""
    try:
        return tempfile.TemporaryFile(dir=folder)
    except PermissionError:
        return None
    except OSError as error:
        if error.errno == errno.EROFS:
            return None
        raise


def _largest_file(folder: Path) -> Path | None:
    """The largest of the first files found, if it makes a sample."""
    largest, looked = (0, Path()), 0
    for base, _, names in os.walk(folder):
        for name in names:
            path, looked = Path(base, name), looked + 1
            with suppress(OSError):
                if path.is_file() and not path.is_symlink():
                    largest = max(largest, (path.stat().st_size, path))
        if largest[0] >= SAMPLE_BYTES or looked > _MOST_LOOKED_AT:
            break
    return largest[1] if largest[0] >= SAMPLE_BYTES and os.access(largest[1], os.R_OK) else None


def _direct(fd: int) -> tuple[int, bool]:
    """The file opened once more, past the host's cache where its file system can do so; and whether it cannot."""
    path = f"/proc/self/fd/{fd}"
    with suppress(OSError):
        direct = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(direct, [mmap.mmap(-1, ROW_BYTES)], 0)
            return direct, False
        except OSError:
            os.close(direct)
    return os.open(path, os.O_RDONLY), True


def _forget(fd: int) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _read_in_order(fd: int, size: int) -> float:
    buffer, done = mmap.mmap(-1, CHUNK_BYTES), 0  # aligned, as reading past the cache asks for
    began = time.perf_counter()
    for offset in range(0, size, CHUNK_BYTES):
        done += os.preadv(fd, [buffer], offset)
        if time.perf_counter() - began > _SEQUENTIAL_S:
            break
    return done / (time.perf_counter() - began)


def _read_at_random(fd: int, size: int) -> tuple[list[float], float]:
    times: list[float] = []
    places = [*range(0, size - ROW_BYTES + 1, ROW_BYTES)]
    random.Random(0).shuffle(places)
    began = time.perf_counter()

    def read(seed: int) -> None:
        buffer = mmap.mmap(-1, ROW_BYTES)
        for place in places[seed::READERS]:  # none twice, for a disk has a cache of its own
            start = time.perf_counter()
            os.preadv(fd, [buffer], place)
            times.append(time.perf_counter() - start)
            if time.perf_counter() - began > _RANDOM_S:
                break

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(READERS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    return times, time.perf_counter() - began


def measure_flushing(folder: Path, tick: Callable[[str], None] = lambda told: None) -> FlushFacts | None:
    """How fast what a run writes there is safe; None where nothing may be written.

    Args:
        folder: one that is there.
        tick: told what is being done.
    Raises:
        OSError: the disk does not answer.
    """
    room = os.statvfs(folder)
    if room.f_bavail * room.f_frsize < _SPARE * SAMPLE_BYTES:
        return None
    if (file := _nameless(folder)) is None:
        return None
    with file:
        tick("flushing")
        times, began = list[float](), time.perf_counter()
        while len(times) < _MOST_FLUSHES:
            os.write(file.fileno(), b"x" * 4096)
            start = time.perf_counter()
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
            if len(times) >= _FEWEST_FLUSHES and time.perf_counter() - began > _FLUSH_S:
                break
        tick("writing")
        began = time.perf_counter()
        done = _write_until(file.fileno(), SAMPLE_BYTES, time.monotonic() + _WRITE_S)
        took_s = time.perf_counter() - began
    return FlushFacts(done / took_s, percentile(times, 50), percentile(times, 99), len(times))


def _write_until(fd: int, size: int, end_s: float) -> int:
    """Write up to `size` bytes that do not compress, and flush them; returns how many."""
    block, done = os.urandom(CHUNK_BYTES), 0
    while done < size and (time.monotonic() < end_s or not done):
        done += os.write(fd, block)
    os.fsync(fd)
    return done


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least `percent` of 100 values do not exceed; 0 of none."""
    rank = -(-len(values) * percent // 100)
    return sorted(values)[max(rank, 1) - 1] if values else 0.0

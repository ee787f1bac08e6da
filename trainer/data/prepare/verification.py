"""Re-read a whole prepared set: every row with its checksums, every header and size, on several processes."""

import json
import math
import os
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from ctypes import c_int64
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.data.catalog.settings import replace_file
from trainer.data.fork_server import fork_server, take_signals
from trainer.data.store.rows import RowProblem
from trainer.data.store.shards import ShardError, read_info
from trainer.data.store.snapshot import SPLITS, PreparedSet, ShardSummary
from trainer.errors import UserError

VERIFY_BAD = "verify-bad.jsonl"
_READ_BYTES = 8 << 20
_POLL_S = 0.5


@dataclass(frozen=True)
class Damage:
    """A row that cannot be read as it was written, or (row -1) a shard that is damaged in another place.

    `images` is how many are lost by it: 1 for a row, all of the shard where none of them can be read.
    """

    file: str
    row: int
    offset: int
    images: int
    reason: str

    def __str__(self) -> str:
        place = f"row {self.row}, byte {self.offset:,}" if self.row >= 0 else f"{self.images:,} images"
        return f"{self.file}: {place}: {self.reason}"


@dataclass(frozen=True)
class Verified:
    """What a verification found."""

    images: int
    """Images that were read, the damaged ones included."""
    num_bytes: int
    damaged_images: int
    damages: int
    """Lines of the list of damages, which is in `verify-bad.jsonl` of the prepared folder."""
    first: tuple[Damage, ...]
    """A few of them."""


Report = Callable[[int, int, int], None]
"""(images read, bytes read, damaged images) so far; called about twice a second."""


def verify(prepared: PreparedSet, processes: int, report: Report, first: int = 20) -> Verified:
    """Re-read everything that the snapshot lists, from the disk and not from the kernel's cache where that is possible.

    Writes `verify-bad.jsonl` into the prepared folder, or removes it where nothing is damaged.
    """
    context = fork_server()
    counts = context.Array(c_int64, 3)
    shards = [shard for split in SPLITS for shard in prepared.shards(split, at_all_resolutions=True)]
    lines: list[str] = []
    shown: list[Damage] = []
    pool = ProcessPoolExecutor(max(1, min(processes, len(shards))), context, _begin, (prepared, counts))
    try:
        left = {pool.submit(_verify_shard, shard) for shard in shards}
        while left:
            done, left = wait(left, _POLL_S)
            for future in done:
                lines += [json.dumps(asdict(damage), ensure_ascii=False) + "\n" for damage in future.result()]
                shown += future.result()[: first - len(shown)]
            report(*counts)
    except BrokenProcessPool as error:
        raise UserError(
            "verify: a process that reads has died; if it was killed for want of memory, lower --processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    path = prepared.path / VERIFY_BAD
    if lines:
        replace_file(path, "".join(lines))
    else:
        path.unlink(missing_ok=True)
    images, num_bytes, damaged_images = counts
    return Verified(images, num_bytes, damaged_images, len(lines), tuple(shown))


_here: tuple[PreparedSet, Any]


def _begin(prepared: PreparedSet, counts: Any) -> None:
    global _here
    _here = prepared, counts
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which lets the shards under way end
    take_signals()


def _verify_shard(shard: ShardSummary) -> list[Damage]:
    """All damages of one shard; what was read is told through the shared counts as it goes on."""
    prepared, counts = _here
    path = prepared.path / shard.name
    _drop_from_cache(path)
    header = ""
    try:
        read_info(path)
    except (ShardError, OSError) as error:
        header = str(error).removeprefix(f"{path}: ")
    problems: list[RowProblem] = []
    shape, dtype = prepared.payload_shape(shard.split, shard.bucket_index)
    at_once = max(1, _READ_BYTES // (math.prod(shape) * dtype.itemsize))
    bytes_before = _bytes_read()
    for begin in range(0, shard.rows, at_once):
        rows = range(begin, min(begin + at_once, shard.rows))
        found = prepared.read_shard(shard, rows).problems
        problems += found
        bytes_now = _bytes_read()
        with counts.get_lock():
            counts[0] += len(rows)
            counts[1] += bytes_now - bytes_before
            counts[2] += len(found)
        bytes_before = bytes_now
    _drop_from_cache(path)  # nobody will read all of it again soon
    if len(problems) == shard.rows and len({problem.reason for problem in problems}) == 1:
        # One line for a shard that is lost, or for a folder of latents that is not mounted.
        first, others = problems[0], len({problem.file for problem in problems}) > 1
        reason = f"{first.reason}, such as {first.file}" if others else first.reason
        return [Damage(shard.name if others else first.file, -1, -1, shard.rows, reason)]
    damages = [Damage(p.file, p.row, p.offset, 1, p.reason) for p in problems]
    return [Damage(shard.name, -1, -1, 0, header), *damages] if header else damages


def _bytes_read() -> int:
    """Bytes that this process has read from files so far, those of its libraries included."""
    with Path("/proc/self/io").open("rb") as file:
        return int(file.readline().split()[1])


def _drop_from_cache(path: Path) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return  # told when it is read
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)

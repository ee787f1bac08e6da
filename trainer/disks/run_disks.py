"""Which workers of a run share a disk: all of them, or those of each host where run directories are on local disks.

In the end all disks have the same: each gets whole checkpoints, so that each host could go on alone. What none of a
host's workers holds comes over the wire, through a group of its own, so that saves beside the training and the
training's exchanges do not wait for each other.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from trainer.errors import UserError
from trainer.parallel.comm import Comm, gather_objects, keep_group_alive, sum_floats

_TIMEOUT = timedelta(hours=1)  # a slow disk holds up its peers' saves, and is no fault
_SAY_EVERY_S = 30.0


@dataclass(frozen=True)
class Disks:
    """The disks of a run, as one worker sees them; those of one host have consecutive ranks.

    Attributes:
        comm: this worker among all.
        workers_each: of each disk.
        group: for what goes from one to another; None where there is one disk.
    """

    comm: Comm
    workers_each: int
    group: "dist.ProcessGroup | None" = None

    @property
    def count(self) -> int:
        """How many there are."""
        return self.comm.world // self.workers_each

    @property
    def mine(self) -> int:
        """The number of this worker's."""
        return self.comm.rank // self.workers_each

    @property
    def workers_here(self) -> range:
        """The ranks of those of this worker's disk."""
        return range(self.worker(self.mine), self.worker(self.mine + 1))

    @property
    def place(self) -> int:
        """This worker's number among those of its disk."""
        return self.comm.rank % self.workers_each

    @property
    def is_first(self) -> bool:
        """Whether this worker does what one has to do for all of its disk."""
        return self.place == 0

    def of(self, rank: int) -> int:
        """The number of a worker's disk."""
        return rank // self.workers_each

    def worker(self, disk: int, place: int = 0) -> int:
        """The rank of a worker by its disk and its number there."""
        return disk * self.workers_each + place


def one_disk(comm: Comm) -> Disks:
    """What all workers see."""
    return Disks(comm, comm.world)


def disks_of(comm: Comm, *, local: bool, environ: Mapping[str, str] = os.environ) -> Disks:
    """The disks of a run; all workers call it, at the same time when they do so first.

    Args:
        local: each host has its own (`run.on_local_disks`).
    """
    each = int(environ.get("LOCAL_WORLD_SIZE", str(comm.world))) if local else comm.world
    return Disks(comm, each, _group(comm)) if 0 < each < comm.world else one_disk(comm)


@functools.cache
def _group(comm: Comm) -> dist.ProcessGroup:
    """Once in a process; and for good, as `keep_group_alive` says."""
    group = dist.new_group(backend="gloo", timeout=_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    keep_group_alive(group)
    return group


def done_by_each(disks: Disks, work: Callable[[], Any]) -> list[Any]:
    """What `work` returns on the first worker of each disk, by disk, on every worker; it may take long, as in
    `done_by_first`.

    Raises:
        UserError: on all workers, with a line on the first of each disk, if one's work raised one.
    """
    with ThreadPoolExecutor(1) as pool:
        doing = pool.submit(work if disks.is_first else lambda: None)
        while sum_floats(disks.comm, [float(not wait([doing], _SAY_EVERY_S).done)])[0]:
            pass
    error = doing.exception()
    if error is not None and not isinstance(error, UserError):
        raise error
    refuse_together(disks, error)
    return gather_objects(disks.comm, doing.result())[:: disks.workers_each]


def refuse_together(disks: Disks, problem: UserError | None) -> None:
    """Raise on all workers what one of them has found, if one has; all workers call it."""
    found = [lines for lines in gather_objects(disks.comm, problem and list(problem.lines)) if lines]
    if found:
        raise UserError(*(found[0] if disks.is_first else []))


@contextlib.contextmanager
def refusing_together(disks: Disks) -> Iterator[None]:
    """Around what one worker may refuse, without exchanges inside: then all workers do, as in `refuse_together`."""
    problem: UserError | None = None
    try:
        yield
    except UserError as error:
        problem = error
    refuse_together(disks, problem)

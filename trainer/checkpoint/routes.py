"""Which rows of a save go from one host's disk to another's, where each has its own: those that nobody there holds.

All workers tell what rows they hold, so that each knows what it sends and what it gets, and nothing but bytes has to
travel beside the training. Of rows that several workers hold, the first sends them; a worker writes what comes from
those that have its own number on their hosts.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from trainer.checkpoint.pieces import FileLayout, stretches
from trainer.checkpoint.write import TensorFile
from trainer.disks.run_disks import Disks
from trainer.parallel.comm import gather_objects

_Rows = list[int] | None
"""First element within the whole tensor, and their number; None: all have all, or there are none."""


@dataclass(frozen=True)
class Arrival:
    """A piece that another worker sends.

    Attributes:
        file: the number of its file in the save.
        offset, num_bytes: where it goes.
    """

    file: int
    offset: int
    num_bytes: int


@dataclass(frozen=True)
class Routes:
    """What a worker sends and gets.

    Attributes:
        to: ranks that get its rows, by file and tensor; of all others, none.
        arrivals: what it gets, by sender, in the order in which that sends it.
    """

    to: Mapping[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    arrivals: Mapping[int, tuple[Arrival, ...]] = field(default_factory=dict)


def routes_of(disks: Disks, files: Sequence[TensorFile], layouts: Sequence[FileLayout]) -> Routes:
    """The routes of a save; all workers call it together."""
    if disks.count == 1:
        return Routes()
    names = [(number, name) for number, layout in enumerate(layouts) for name in layout.offsets]
    everyones: list[list[_Rows]] = gather_objects(disks.comm, [_rows(files[number], name) for number, name in names])
    to: dict[tuple[int, str], tuple[int, ...]] = {}
    arrivals: dict[int, list[Arrival]] = {}
    for index, (number, name) in enumerate(names):
        for sender, receivers, rows in _exchanges(disks, [rows[index] for rows in everyones]):
            if sender == disks.comm.rank:
                to[number, name] = receivers
            elif disks.comm.rank in receivers:
                size, begin = files[number].tensors[name].dtype.itemsize, layouts[number].offsets[name]
                cut = stretches(0, rows[1], begin + rows[0] * size, size)
                pieces = [Arrival(number, offset, (last - first) * size) for first, last, offset in cut]
                arrivals.setdefault(sender, []).extend(pieces)
    return Routes(to, {sender: tuple(pieces) for sender, pieces in arrivals.items()})


def _rows(file: TensorFile, name: str) -> _Rows:
    held = file.tensors[name]
    return [held.first_row * prod(held.shape[1:]), held.part.numel()] if held.is_share and held.part.numel() else None


def _exchanges(disks: Disks, held: Sequence[_Rows]) -> Iterator[tuple[int, tuple[int, ...], list[int]]]:
    """Of one tensor: who sends which rows, and to whom; `held` by rank."""
    there: dict[tuple[int, ...], dict[int, int]] = {}  # by rows: the first worker of each disk that holds them
    for rank, rows in enumerate(held):
        if rows is not None:
            there.setdefault(tuple(rows), {}).setdefault(disks.of(rank), rank)
    for rows, holders in there.items():
        # Where several workers of a disk have the same rows, and each writes a stretch of them, its workers are more
        # than a group, which are neighbours: then every disk has all rows. So a sender has all of these to itself.
        sender = min(holders.values())
        place = sender % disks.workers_each
        receivers = tuple(disks.worker(disk, place) for disk in range(disks.count) if disk not in holders)
        if receivers:
            yield sender, receivers, list(rows)

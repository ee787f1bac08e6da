"""Which checkpoint a run goes on from whose hosts each have their own: one, the same on all of them.

That is the newest that is whole on any of the disks, so that no step is lost with one of them. A disk that lacks it, or
has another by its name, gets it over the wire before anything else happens. Checkpoints are the same if their manifests
are, which hold a checksum of every file.
"""

import logging
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.manifest import MANIFEST, find_damage, manifest_entry, read_manifest
from trainer.checkpoint.resume_point import (
    Damaged,
    has_begun_at,
    leave_other_ways,
    move_aside,
    newest_whole,
    none_is_whole,
    note_beginning,
    own_or_wished,
    set_aside,
)
from trainer.checkpoint.roll_back import ORDER, go_back_to, ordered_step
from trainer.checkpoint.run_dir import checkpoint_dir, checkpoint_step
from trainer.checkpoint.write import publish_copy
from trainer.disks.carry import receive_files, send_files
from trainer.disks.run_disks import Disks, done_by_each, refuse_together
from trainer.errors import UserError
from trainer.host.disk_room import free_bytes, told_bytes

_log = logging.getLogger(__name__)
Found = tuple[int, int, str]
"""A checkpoint: its step, the number of its place on each disk, and the checksum of its manifest."""


@dataclass(frozen=True)
class _Look:
    """What one disk has: the newest whole checkpoint, and damaged ones that are newer; `host`: whose it is, by disk."""

    hosts: Sequence[str]
    found: Sequence[Found | None]
    own: Path | None
    damaged: Damaged


def resume_across_disks(disks: Disks, places: Sequence[Path], wish: bool | str) -> Path | None:
    """The checkpoint to go on from by `run.resume`, on this worker's disk; all workers call it.

    Args:
        places: where checkpoints are on each disk, the run directory first.

    Raises:
        UserError: none can be gone on from, by what was asked for; with a line on each host.
    """
    _obey_roll_back(disks, places)
    if wish is False:
        return None
    if wish is True or wish == "auto":
        found = _newest(disks, places)
        if found is None and wish is True:
            raise _told_once(disks, f"run.resume = true: no checkpoint in {places[0]}; auto starts fresh without one")
        return found
    return _from(disks, places, Path(wish))


def _obey_roll_back(disks: Disks, places: Sequence[Path]) -> None:
    """What was ordered on any disk, on all of them; it stands until all have done it.

    The order lies on the disk of the host that was the first then, which need not be so now.
    """
    orders = [step for step in done_by_each(disks, lambda: ordered_step(places[0])) if step is not None]
    if orders:
        done_by_each(disks, lambda: go_back_to(places, min(orders), _log.warning))
        done_by_each(disks, lambda: (places[0] / ORDER).unlink(missing_ok=True))


def _from(disks: Disks, places: Sequence[Path], wish: Path) -> Path:
    """As `resume_from`: where this start is not the first from there, what the run has made of it."""
    _require_everywhere(disks, wish)
    if any(done_by_each(disks, lambda: has_begun_at(places[0], wish))):
        log = _log.warning if disks.is_first else _log.debug
        return own_or_wished(places[0], _newest(disks, places), wish, log)
    # Written down when no disk has anything left that does not lead there.
    done_by_each(disks, lambda: leave_other_ways(places[0], wish, _log.warning))
    done_by_each(disks, lambda: note_beginning(places[0], wish))
    return wish


def _require_everywhere(disks: Disks, wish: Path) -> None:
    hosts = done_by_each(disks, socket.gethostname)
    found = done_by_each(disks, lambda: [find_damage(wish) if wish.is_dir() else "it is not there", _print_of(wish)])
    whole = [number for number, (damage, _) in enumerate(found) if damage is None]
    if not whole:
        raise _told_once(disks, f"run.resume = {wish}: {found[0][0]}")
    _, usual = found[whole[0]]
    for number, (damage, own) in enumerate(found):
        if damage is not None or own != usual:
            what = damage or "another checkpoint"
            there = f"{hosts[number]}:{wish.absolute()}/"
            text = f"run.resume = {wish}: on {hosts[number]}, {what}; copy it from {hosts[whole[0]]}: "
            raise _told_once(disks, text + f"rsync -a --delete --mkpath {wish.absolute()}/ {there}")


def _newest(disks: Disks, places: Sequence[Path]) -> Path | None:
    look = _look(disks, places)
    there = [(found, disk) for disk, found in enumerate(look.found) if found is not None]
    if not there:
        refuse_together(disks, none_is_whole(places[0], look.damaged) if look.damaged else None)
        return None
    chosen, source = max(there, key=lambda each: (each[0][0], -each[1]))
    lacking = [disk for disk, found in enumerate(look.found) if found is None or not _is_same(found, chosen)]
    done_by_each(disks, lambda: _make_way(look, places, chosen, is_source=disks.mine == source))
    if lacking:
        _copy_to(disks, places, look, chosen, source, lacking)
    own = checkpoint_dir(places[chosen[1]], chosen[0]) if disks.mine in lacking else look.own
    return Path(done_by_each(disks, lambda: str(own))[disks.mine])


def _look(disks: Disks, places: Sequence[Path]) -> _Look:
    own: Path | None = None
    damaged: Damaged = ()

    def look() -> Found | None:
        nonlocal own, damaged
        own, damaged = newest_whole(places)
        if own is None:
            return None
        return checkpoint_step(own), [*places].index(own.parent.parent), _print_of(own)

    hosts = done_by_each(disks, socket.gethostname)
    found = [(each[0], each[1], each[2]) if each else None for each in done_by_each(disks, look)]
    return _Look(hosts, found, own, damaged)


def _is_same(one: Found, other: Found) -> bool:
    return (one[0], one[2]) == (other[0], other[2])


def _make_way(look: _Look, places: Sequence[Path], chosen: Found, *, is_source: bool) -> None:
    """On one disk: damaged ones get other names, and so does a whole one that another run has made of this step."""
    step = chosen[0]
    for path, reason in look.damaged:
        is_there = checkpoint_step(path) == step and not is_source
        then = "another host has it whole" if is_there else f"its steps are done anew from step-{step:08d}"
        set_aside(path, reason, then, _log.warning)
    path = checkpoint_dir(places[chosen[1]], step)
    if (path / MANIFEST).is_file() and _print_of(path) != chosen[2]:
        aside, moved = move_aside(path.parent.parent, [path], "not-on-all-hosts")
        _log.warning("%s: another one than the other hosts have; moved to %s", moved, aside)


def _copy_to(
    disks: Disks, places: Sequence[Path], look: _Look, chosen: Found, source: int, lacking: Sequence[int]
) -> None:
    """Copy the chosen checkpoint from one disk to those that lack it; not a byte where one has no room for it."""
    path = checkpoint_dir(places[chosen[1]], chosen[0])
    origin = look.own if disks.mine == source else None
    files: dict[str, int] = {}  # of the source alone: what cannot be read is told before anyone waits for bytes

    def note_files() -> int:
        if origin is not None:
            files.update({name: int(entry["size"]) for name, entry in read_manifest(origin).items()})
        return sum(files.values())

    size = max(done_by_each(disks, note_files))

    def require_room() -> None:
        if disks.mine in lacking and (free := free_bytes(path)) < size:
            here = f"{path}: {look.hosts[disks.mine]} has {told_bytes(free)} free"
            raise UserError(f"{here}, and this checkpoint, which {look.hosts[source]} has, takes {told_bytes(size)}")

    def copy() -> None:
        try:
            if origin is not None:
                for disk in lacking:
                    send_files(disks, origin, [*files, MANIFEST], disks.worker(disk))
            elif disks.mine in lacking:
                _take(disks, path, disks.worker(source))
        except OSError as error:
            raise UserError(f"{path}: not copied from {look.hosts[source]} ({error.strerror or error})") from None

    done_by_each(disks, require_room)
    done_by_each(disks, copy)
    if disks.comm.rank == 0:
        to = ", ".join(look.hosts[disk] for disk in lacking)
        _log.warning("%s: %s had it not; copied from %s, %s", path, to, look.hosts[source], told_bytes(size))


def _take(disks: Disks, path: Path, sender: int) -> None:
    partial = path.with_name(f"{path.name}.copied.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        receive_files(disks, partial, sender)
        if (damage := find_damage(partial)) is not None:
            raise OSError(f"what came is damaged: {damage}")
        publish_copy(partial, path)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _print_of(checkpoint: Path) -> str:
    """What tells a checkpoint from others; empty where there is none."""
    file = checkpoint / MANIFEST
    return str(manifest_entry(file)["xxh3_128"]) if file.is_file() else ""


def _told_once(disks: Disks, line: str) -> UserError:
    """The same on all workers, with the line on one of each host."""
    return UserError(*([line] if disks.is_first else []))

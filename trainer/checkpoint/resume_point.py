"""Where a run goes on from, and what of its directory then belongs to a way that is left. Free of torch.

One process calls this, which holds the run directory. Nothing is deleted: damaged checkpoints are renamed, later ones
of another way are moved.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.checkpoint.manifest import MANIFEST, find_damage, manifest_entry
from trainer.checkpoint.run_dir import CHECKPOINTS, DAMAGED, checkpoint_step, list_checkpoints
from trainer.errors import UserError
from trainer.guards import Refused, read_json

RECORD = "resumed_from.json"

Log = Callable[[str], None]


def resume_newest(
    run_dir: Path, log: Log, written_after: Path | None = None, stand_in: Path | None = None
) -> Path | None:
    """The newest checkpoint whose files agree with its manifest, if there is one; damaged newer ones are set aside.

    Args:
        written_after: only what is newer than this file counts.
        stand_in: a run directory on another disk, for checkpoints that could not be written to this one.

    Raises:
        UserError: there are checkpoints, and all of them are damaged.
    """
    after = written_after.stat().st_mtime_ns if written_after else 0
    path, damaged = newest_whole((run_dir, stand_in) if stand_in else (run_dir,), after)
    if path is not None:
        for wrong in damaged:
            set_aside(*wrong, f"its steps are done anew from {path.name}", log)
        if path.parent.parent == stand_in:
            log(f"{path}: the newest checkpoint, written there because {run_dir} could not be written to")
        return path
    if damaged and written_after is None:
        raise none_is_whole(run_dir, damaged)
    return None


Damaged = Sequence[tuple[Path, str]]
"""Checkpoints, each with what is wrong with it."""


def newest_whole(places: Sequence[Path], after_ns: int = 0) -> tuple[Path | None, Damaged]:
    """The newest checkpoint whose files agree with its manifest, and the damaged ones that are newer.

    Args:
        places: the run directory, and its stand-in if there may be one.
        after_ns: only what was written later counts.
    """
    listed = [path for place in places for path in list_checkpoints(place)]
    candidates = [path for path in listed if (path / MANIFEST).stat().st_mtime_ns > after_ns]
    candidates.sort(key=checkpoint_step)
    damaged: list[tuple[Path, str]] = []
    for path in reversed(candidates):
        damage = find_damage(path)
        if damage is None:
            return path, damaged
        damaged.append((path, damage))
    return None, damaged


def set_aside(path: Path, reason: str, then: str, log: Log) -> None:
    """Give a damaged checkpoint another name; `then`: what is done without it."""
    aside = _free_name(path.with_name(path.name + DAMAGED))
    path.rename(aside)
    log(f"{path}: {reason}; set aside as {aside.name}, {then}")


def none_is_whole(run_dir: Path, damaged: Damaged) -> UserError:
    """What ends a start that has damaged checkpoints alone to go on from."""
    lines = [f"{path}: {reason}" for path, reason in damaged[:5]]
    mend = "give another run.dir, or delete them to start afresh"
    return UserError(*lines, f"{run_dir}: no checkpoint is whole; {mend}")


def resume_from(run_dir: Path, wish: Path, log: Log) -> Path:
    """The checkpoint `wish` where it is given for the first time; later, what the run has made of it.

    Checkpoints of the run that do not lead to `wish` are moved to `checkpoints/before-resume-DATE/`.

    Raises:
        UserError: the checkpoint is damaged.
    """
    if (damage := find_damage(wish)) is not None:
        raise UserError(f"run.resume = {wish}: {damage}")
    if has_begun_at(run_dir, wish):
        own = resume_newest(run_dir, log) if list_checkpoints(run_dir) else None
        return own_or_wished(run_dir, own, wish, log)
    leave_other_ways(run_dir, wish, log)
    note_beginning(run_dir, wish)
    return wish


def has_begun_at(run_dir: Path, wish: Path) -> bool:
    """Whether the run has gone on from this checkpoint before."""
    return _read(run_dir / RECORD) == _record(wish)


def own_or_wished(run_dir: Path, own: Path | None, wish: Path, log: Log) -> Path:
    """What a run has made of the checkpoint `wish`, if it has; `own`: its newest."""
    if own is None or checkpoint_step(own) <= checkpoint_step(wish):
        return wish
    log(
        f"run.resume = {wish}: the run went on from there before, and goes on from its own {own.name}; to start "
        f"there once more, delete {run_dir / RECORD}"
    )
    return own


def leave_other_ways(run_dir: Path, wish: Path, log: Log) -> None:
    """Move the checkpoints of the run that do not lead to `wish`."""
    step, is_own = checkpoint_step(wish), wish.resolve().parent == (run_dir / CHECKPOINTS).resolve()
    left = [path for path in list_checkpoints(run_dir) if not is_own or checkpoint_step(path) > step]
    if left:
        aside, moved = move_aside(run_dir, left, "before-resume")
        log(f"{moved}: of the run as it was before; moved to {aside}")


def note_beginning(run_dir: Path, wish: Path) -> None:
    """Write down that the run goes on from `wish`, when nothing that does not lead there is left."""
    run_dir.mkdir(parents=True, exist_ok=True)
    record = run_dir / RECORD
    partial = record.with_suffix(".tmp")
    partial.write_text(json.dumps(_record(wish)) + "\n")
    partial.replace(record)


def _record(wish: Path) -> dict[str, object]:
    return {"from": str(wish.resolve()), "manifest": manifest_entry(wish / MANIFEST)}


def move_aside(run_dir: Path, checkpoints: Sequence[Path], name: str) -> tuple[Path, str]:
    """Move checkpoints of a run, oldest first, into a folder beside them; its path, and theirs in words."""
    aside = _free_name(run_dir / CHECKPOINTS / time.strftime(f"{name}-%Y-%m-%d"))
    aside.mkdir()
    for path in checkpoints:
        path.rename(aside / path.name)
    first, last = checkpoints[0].name, checkpoints[-1].name
    return aside, f"{first} to {last}" if len(checkpoints) > 1 else first


def _read(file: Path) -> object:
    try:
        return read_json(file)
    except (OSError, Refused):
        return None


def _free_name(path: Path) -> Path:
    """The path, or with a number behind it if there is something."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate

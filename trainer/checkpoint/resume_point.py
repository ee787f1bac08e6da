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
    listed = list_checkpoints(run_dir) + (list_checkpoints(stand_in) if stand_in else [])
    candidates = [path for path in listed if (path / MANIFEST).stat().st_mtime_ns > after]
    candidates.sort(key=checkpoint_step)
    damaged: list[tuple[Path, str]] = []
    for path in reversed(candidates):
        damage = find_damage(path)
        if damage is None:
            for wrong, reason in damaged:
                aside = _free_name(wrong.with_name(wrong.name + DAMAGED))
                wrong.rename(aside)
                log(f"{wrong}: {reason}; set aside as {aside.name}, its steps are done anew from {path.name}")
            if path.parent.parent == stand_in:
                log(f"{path}: the newest checkpoint, written there because {run_dir} could not be written to")
            return path
        damaged.append((path, damage))
    if damaged and written_after is None:
        lines = [f"{path}: {reason}" for path, reason in damaged[:5]]
        mend = "give another run.dir, or delete them to start afresh"
        raise UserError(*lines, f"{run_dir}: no checkpoint is whole; {mend}")
    return None


def resume_from(run_dir: Path, wish: Path, log: Log) -> Path:
    """The checkpoint `wish` where it is given for the first time; later, what the run has made of it.

    Checkpoints of the run that do not lead to `wish` are moved to `checkpoints/before-resume-DATE/`.

    Raises:
        UserError: the checkpoint is damaged.
    """
    if (damage := find_damage(wish)) is not None:
        raise UserError(f"run.resume = {wish}: {damage}")
    record, before = {"from": str(wish.resolve()), "manifest": manifest_entry(wish / MANIFEST)}, run_dir / RECORD
    step, is_own = checkpoint_step(wish), wish.resolve().parent == (run_dir / CHECKPOINTS).resolve()
    if _read(before) == record:
        own = resume_newest(run_dir, log) if list_checkpoints(run_dir) else None
        if own is None or checkpoint_step(own) <= step:
            return wish
        log(
            f"run.resume = {wish}: the run went on from there before, and goes on from its own {own.name}; to start "
            f"there once more, delete {before}"
        )
        return own
    left = [path for path in list_checkpoints(run_dir) if not is_own or checkpoint_step(path) > step]
    if left:
        aside, moved = move_aside(run_dir, left, "before-resume")
        log(f"{moved}: of the run as it was before; moved to {aside}")
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = before.with_suffix(".tmp")
    partial.write_text(json.dumps(record) + "\n")
    partial.replace(before)
    return wish


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

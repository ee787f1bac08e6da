"""The run directory: where its files lie, which checkpoints are whole, and who may write. Free of torch."""

import fcntl
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from trainer.checkpoint.manifest import MANIFEST, STATE, find_damage
from trainer.errors import UserError
from trainer.guards import read_json

_log = logging.getLogger(__name__)

STEP_NAME = re.compile(r"step-(\d{8})")
_STEP_OF = re.compile(r"step-(\d{8})(-.*)?")  # of weights that were computed from several checkpoints, too
RESOLVED_CONFIG = "config.resolved.yaml"  # written when a command starts
CHECKPOINTS = "checkpoints"
DAMAGED = ".damaged"  # behind the name of a checkpoint that was set aside


def checkpoint_dir(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return run_dir / CHECKPOINTS / f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's folder name."""
    match = _STEP_OF.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: not a checkpoint; its folder is named like step-00001000")
    return int(match.group(1))


def config_beside(checkpoint: Path) -> Path:
    """The configuration of a checkpoint's run; of weights that were computed elsewhere, the one they carry."""
    own = checkpoint / RESOLVED_CONFIG
    return own if own.is_file() else checkpoint.parent.parent / RESOLVED_CONFIG


def list_checkpoints(run_dir: Path, folder: str = CHECKPOINTS) -> list[Path]:
    """Complete checkpoints of a run, oldest first (by name and manifest only; contents unread).

    Args:
        folder: in the run's directory, where they are, or what is written as they are.
    """
    found = [p for p in (run_dir / folder).glob("step-*") if STEP_NAME.fullmatch(p.name)]
    return sorted(p for p in found if (p / MANIFEST).is_file())


def fallback_run_dir(fallback: Path, run_dir: Path) -> Path:
    """The stand-in, on another disk, of a run's directory that cannot be written to; its own by the full path."""
    whole = str(run_dir.absolute())
    return fallback / f"{run_dir.absolute().name}-{xxhash.xxh32_hexdigest(whole.encode())}"


def hand_over_config(run_dir: Path, stand_in: Path) -> None:
    """Put the run's configuration beside its checkpoints, so that they can be exported from there."""
    if (config := run_dir / RESOLVED_CONFIG).is_file():
        shutil.copyfile(config, stand_in / RESOLVED_CONFIG)


def prune_checkpoints(
    run_dir: Path,
    keep: int | None,
    in_use: Path | None = None,
    folder: str = CHECKPOINTS,
    always: int | None = None,
) -> None:
    """Delete all but the `keep` newest checkpoints and the one in use, and what interrupted writes left behind.

    Args:
        keep: None: all.
        always: those of every so many steps stay.
    """
    found = list_checkpoints(run_dir, folder)
    for old in found[: max(len(found) - keep, 0)] if keep is not None else ():
        if old != in_use and not (always and checkpoint_step(old) % always == 0):
            delete_checkpoint(old)
    for left_over in (run_dir / folder).glob("step-*"):
        if DAMAGED not in left_over.name and (not (left_over / MANIFEST).is_file() or left_over.suffix == ".tmp"):
            shutil.rmtree(left_over, ignore_errors=True)


def delete_checkpoint(path: Path) -> None:
    """The manifest goes first, so that a half-deleted checkpoint is never taken for a whole one."""
    (path / MANIFEST).unlink()
    shutil.rmtree(path)


def newest_checkpoint(run_dir: Path, log: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that has all its files in their sizes; others are named and passed over.

    Contents are not read: whoever opens a file compares it with the manifest.
    """
    for path in reversed(list_checkpoints(run_dir)):
        damage = find_damage(path, contents=False)
        if damage is None:
            return path
        log(f"{path}: {damage}; trying the one before")
    return None


def checkpoint_at(place: Path) -> Path | None:
    """The checkpoint that is meant by `place`: itself, or a run's newest that has its files; None if there is none.

    Raises:
        UserError: it is itself a checkpoint, and damaged.
    """
    if not (place / MANIFEST).is_file():
        return newest_checkpoint(place, _log.warning)
    if (damage := find_damage(place, contents=False)) is not None:
        raise UserError(f"{place}: {damage}; take another checkpoint")
    return place


def read_state(path: Path) -> dict[str, object]:
    """The JSON part of a checkpoint's training state."""
    return read_json(path / STATE)


@contextmanager
def only_writer(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; a second process that wants it gets a UserError. Death releases it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "run.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another sdxl-train is writing to this run directory") from None
        yield

"""The run directory: where its files lie, which checkpoints are whole, and who may write. Free of torch."""

import fcntl
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from trainer.errors import UserError

STEP_NAME = re.compile(r"step-(\d{8})")
_STEP_OF = re.compile(r"step-(\d{8})(-.*)?")  # of weights that were computed from several checkpoints, too
MANIFEST = "manifest.json"
RESOLVED_CONFIG = "config.resolved.yaml"  # written when a command starts
STATE = "training_state/state.json"
CHECKPOINTS = "checkpoints"
_PIECE = 8 << 20


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


def prune_checkpoints(run_dir: Path, keep: int | None, in_use: Path | None = None, folder: str = CHECKPOINTS) -> None:
    """Delete all but the `keep` newest checkpoints and the one in use, and what interrupted writes left behind."""
    for old in list_checkpoints(run_dir, folder)[:-keep] if keep else ():
        if old != in_use:
            delete_checkpoint(old)
    for left_over in (run_dir / folder).glob("step-*"):
        if not (left_over / MANIFEST).is_file() or left_over.suffix == ".tmp":
            shutil.rmtree(left_over, ignore_errors=True)


def delete_checkpoint(path: Path) -> None:
    """The manifest goes first, so that a half-deleted checkpoint is never taken for a whole one."""
    (path / MANIFEST).unlink()
    shutil.rmtree(path)


def find_damage(path: Path) -> str | None:
    """Compare every file of a checkpoint with its manifest; the first difference, or None."""
    try:
        entries = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in entries.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != expected["size"]:
            return f"{name} has {file.stat().st_size:,} bytes, not {expected['size']:,}"
        if manifest_entry(file) != expected:
            return f"{name} has changed (checksum)"
    return None


def newest_checkpoint(run_dir: Path, log: Callable[[str], None], written_after: Path | None = None) -> Path | None:
    """The newest checkpoint whose files agree with its manifest; damaged ones are named and passed over.

    Args:
        written_after: only what is newer than this file counts.
    """
    after = written_after.stat().st_mtime_ns if written_after else 0
    for path in reversed(list_checkpoints(run_dir)):
        if (path / MANIFEST).stat().st_mtime_ns <= after:
            continue
        damage = find_damage(path)
        if damage is None:
            return path
        log(f"{path}: {damage}; trying the one before")
    return None


def read_state(path: Path) -> dict[str, object]:
    """The JSON part of a checkpoint's training state."""
    return json.loads((path / STATE).read_text())


def manifest_entry(file: Path) -> dict[str, object]:
    """Size in bytes and xxh3-128 of a file, as the manifest holds them."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while piece := stream.read(_PIECE):
            digest.update(piece)
    return {"size": file.stat().st_size, "xxh3_128": digest.hexdigest()}


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

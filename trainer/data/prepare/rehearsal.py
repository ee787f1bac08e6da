"""`prepare --dry-run`: the plan is made in a folder of its own, with a copy of what earlier ones have left.

So it is the plan that `prepare` would make, and the prepared folder is only read.
"""

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

from trainer.data.catalog.catalog import FULL, NoRoom
from trainer.data.catalog.settings import PrepareSettings, replace_file
from trainer.data.store.snapshot_file import current_snapshot
from trainer.errors import UserError
from trainer.guards import Refused, read_json

_SPEED, _CATALOG = "speed.json", "catalog.sqlite"
_SMALL_FILES = ("settings.json", "scan-settings.json", "moved.json", "CURRENT")
_ROOM = 3  # times the catalogue: the copy, the table of what is listed, and that by key


@contextmanager
def rehearsed(settings: PrepareSettings) -> Iterator[PrepareSettings]:
    """The same settings for a temporary folder (`TMPDIR` says where), which is deleted afterwards.

    Raises:
        UserError: there is no room for the copy; or what is raised meanwhile, told of the prepared folder.
    """
    prepared = settings.prepared
    with tempfile.TemporaryDirectory(prefix="sdxl-train-dry-run-") as folder:
        copy = Path(folder) / "prepared"
        copy.mkdir()
        try:
            _copy(prepared, copy)
            yield replace(settings, prepared=copy)
        except NoRoom:
            raise UserError(
                f"--dry-run works on a copy of {prepared / _CATALOG}, for which there is not room enough in "
                f"{tempfile.gettempdir()}; name a folder with room, such as TMPDIR={prepared.parent}"
            ) from None
        except UserError as error:
            raise UserError(*(line.replace(str(copy), str(prepared)) for line in error.lines)) from None


def _copy(prepared: Path, copy: Path) -> None:
    for name in _SMALL_FILES:
        if (prepared / name).is_file():
            shutil.copyfile(prepared / name, copy / name)
    if (snapshot := current_snapshot(prepared)) is not None:
        (copy / "snapshots").mkdir()
        shutil.copyfile(prepared / "snapshots" / snapshot, copy / "snapshots" / snapshot)
    catalog = prepared / _CATALOG
    if not catalog.is_file():
        return
    wanted, free = int(_ROOM * catalog.stat().st_size), shutil.disk_usage(copy).free
    if wanted > free:
        raise UserError(
            f"--dry-run works on a copy of {catalog}, for which {tempfile.gettempdir()} needs {wanted / 1e9:,.1f} GB "
            f"and has {free / 1e9:,.1f} GB; name a folder with room, such as TMPDIR={prepared.parent}"
        )
    try:
        with (
            closing(sqlite3.connect(f"{catalog.resolve().as_uri()}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(copy / _CATALOG)) as target,
        ):
            source.backup(target)
    except sqlite3.DatabaseError as error:
        if str(error) == FULL:
            raise NoRoom(f"{copy}: {error}") from None
        raise UserError(f"{catalog}: cannot be read ({error}); run `sdxl-train prepare` without --dry-run") from None


def note_speed(prepared: Path, images_per_s: float, workers: int) -> None:
    """Keep how fast images were encoded, for the next estimate."""
    text = json.dumps({"images_per_s": round(images_per_s, 4), "workers": workers})
    replace_file(prepared / _SPEED, text + "\n")


def known_speed(prepared: Path) -> tuple[float, int] | None:
    """Images per second of all workers together, and how many these were, when images were last encoded."""
    try:
        found = read_json(prepared / _SPEED)
        images_per_s, workers = float(found["images_per_s"]), int(found["workers"])
    except (OSError, Refused, KeyError, TypeError, ValueError):
        return None
    return (images_per_s, workers) if 0 < images_per_s < float("inf") and workers > 0 else None

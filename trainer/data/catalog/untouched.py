"""Whether anything can have changed since the sources were last looked through, told without listing them.

Of sources that a metadata file or whole archives describe, size and time of these files say so, and the times of the
folders in which single latents lie, which change when a file is added, removed or renamed. Of folders of images, each
file has to be asked: there is nothing to be saved.
"""

import json
import os
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import xxhash

from trainer.config.sections.data.sources import (
    KohyaJsonSource,
    LatentTarsSource,
    ParquetSource,
    Source,
    WebdatasetSource,
)
from trainer.data.catalog.scan_counts import ScanCounts
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.sources.columns import files_below
from trainer.errors import UserError

_TABLE = "CREATE TABLE IF NOT EXISTS looked_through (stamp TEXT NOT NULL, found TEXT NOT NULL)"


def stamp_of(settings: PrepareSettings) -> str | None:
    """Differs where anything that `prepare` looks at may; None where that cannot be told, or something is not there."""
    if settings.filters.is_on:
        return None
    hashed = xxhash.xxh3_128(json.dumps(settings.to_json(), sort_keys=True).encode())
    try:
        for source in settings.sources:
            for path in _telling(source, settings):
                found = os.stat(path)  # noqa: PTH116 - no Path object for each folder
                hashed.update(
                    f"{path}\0{found.st_size}\0{found.st_mtime_ns}\0{found.st_ino}\0".encode(errors="replace")
                )
    except (OSError, UserError, _CannotTell):
        return None
    return hashed.hexdigest()


class _CannotTell(Exception):
    """Each file of a source has to be asked."""


def _telling(source: Source, settings: PrepareSettings) -> Iterator[str]:
    """The files and folders whose times and sizes tell."""
    if isinstance(source, KohyaJsonSource) and source.latents is not None:
        yield str(source.path)
        yield from _folders(source.latents)
    elif isinstance(source, LatentTarsSource):
        yield str(source.metadata)
        yield from _files(source.tars, ".tar", "tars", settings)
    elif isinstance(source, WebdatasetSource):
        yield from _files(source.tars, ".tar", "tars", settings)
    elif isinstance(source, ParquetSource) and source.images is None:
        yield from _files(source.files, ".parquet", "files", settings)
    else:
        raise _CannotTell


def _files(place: Path, ending: str, field: str, settings: PrepareSettings) -> list[str]:
    return [path for path, _ in files_below(place, ending, field, Counter(), settings.limits)]


def _folders(root: Path) -> Iterator[str]:
    """It and all below; links to folders are not followed, and cannot be told."""
    waiting = [str(root)]
    while waiting:
        folder = waiting.pop()
        yield folder
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif entry.is_symlink():
                    raise _CannotTell


def found_before(connection: sqlite3.Connection, stamp: str | None) -> ScanCounts | None:
    """What would be found again, if the last whole look ended well and was at this; else None."""
    connection.execute(_TABLE)
    last = connection.execute("SELECT found FROM looked_through WHERE stamp = ?", (stamp,)).fetchone()
    if last is None:
        return None
    (known,) = connection.execute("SELECT COUNT(*) FROM rows").fetchone()
    found = json.loads(last[0])
    return ScanCounts(listed=found["listed"], known=known, bad=found["bad"], ignored=Counter(found["ignored"]))


def note_look(connection: sqlite3.Connection, stamp: str | None, counts: ScanCounts) -> None:
    """The sources were looked through, to the end, as they are at this stamp; None: something is left to be done."""
    connection.execute(_TABLE)
    connection.execute("DELETE FROM looked_through")
    if stamp is not None:
        found = {"listed": counts.listed, "bad": counts.bad, "ignored": counts.ignored}
        connection.execute("INSERT INTO looked_through VALUES (?, ?)", (stamp, json.dumps(found)))

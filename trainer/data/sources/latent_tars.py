"""Tars with members `<id>.npz`, read where they lie, and kohya's metadata file with their captions.

Which member belongs to an entry is told by the last part of its key: `danbooru/123` is `123.npz`. Where the folder of
keys is also a folder of tars (`tars/danbooru/0123.tar`), only tars there count. Should two entries still lay claim to
one member, nothing is guessed.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import zlib
from array import array
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.sources.columns import files_below
from trainer.data.sources.kohya import image_stem
from trainer.data.sources.metadata import MetadataEntry, read_metadata
from trainer.data.sources.source import OWN_MASK, SourceItem
from trainer.data.sources.tar_members import BadTar, TarMember, walk_tar
from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, Limits, Refused

if TYPE_CHECKING:
    from trainer.config.sections.data.sources import LatentTarsSource

_THREADS = 4
_PAGE = 512
_Found = tuple[int, int, int, int]  # number of the member, number of the tar, offset, length


def list_latent_tars(
    source: LatentTarsSource,
    name: str,
    ignored: Counter[str],
    scratch: Path,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[SourceItem]:
    """An item for each entry of the metadata that has a member.

    Args:
        ignored: counts entries without a member (of tars that were not downloaded, say), members without an entry, and
            members that are no latents.
        scratch: a folder for a temporary table of all members.
    """
    tars = [path for path, _ in files_below(source.tars, ".tar", "tars", ignored, limits)]
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        connection = sqlite3.connect(Path(folder) / "members.sqlite", isolation_level=None)
        with closing(connection):
            members = yield from _list_members(connection, tars, name, ignored)
            used_by = array("I", [0]) * (1 + members)  # for each member a checksum of its key, never 0
            folders = [frozenset(Path(tar).parts[:-1]) for tar in tars]
            stamps = [os.stat(tar).st_mtime_ns for tar in tars]  # noqa: PTH116
            for page in _pages(read_metadata(source.metadata, source.weight_field, limits, source.score_field)):
                for entry, found in zip(page, _look_up(connection, page, folders), strict=True):
                    if entry.problem:
                        yield SourceItem(f"{name}/{entry.key}", str(source.metadata), problem=entry.problem)
                    elif found is None:
                        ignored["metadata without latents"] += 1
                    else:
                        number, tar, offset, length = found
                        checksum = zlib.crc32(entry.key.encode()) | 1
                        if used_by[number] not in (0, checksum):  # the same key twice is told by the scan
                            raise _claimed_twice(source, entry.key, tars[tar])
                        used_by[number] = checksum
                        yield SourceItem(
                            f"{name}/{entry.key}",
                            tars[tar],
                            offset,
                            length,
                            kind="latents",
                            caption=entry.caption,
                            repeats=source.repeats,
                            original_hw=entry.original_hw,
                            bucket_hw=entry.bucket_hw,
                            file_bytes=length,
                            mtime_ns=stamps[tar],
                            mask=None if source.masks == "none" else OWN_MASK,
                        )
            if left := used_by.count(0) - 1:
                ignored["latents without metadata"] += left


def _list_members(
    connection: sqlite3.Connection, tars: list[str], name: str, ignored: Counter[str]
) -> Iterator[SourceItem]:
    """Fills the table of members; yields an item with a problem for each damaged tar, returns how many there are."""
    connection.execute("PRAGMA journal_mode = OFF")
    connection.execute("PRAGMA synchronous = OFF")
    connection.execute("CREATE TABLE listed (id TEXT, tar INT, offset INT, length INT)")
    with ThreadPoolExecutor(_THREADS, "tar") as pool:
        for first in range(0, len(tars), _THREADS):
            some = tars[first : first + _THREADS]
            for number, (found, problem) in enumerate(pool.map(_members, some), start=first):
                if problem:
                    yield SourceItem(f"{name}/{tars[number]}", tars[number], problem=problem)
                for member in found:
                    if member.problem:
                        yield SourceItem(f"{name}/{tars[number]}/{member.name}", tars[number], problem=member.problem)
                rows = [
                    (member.name.rpartition("/")[2][:-4], number, member.offset, member.size)
                    for member in found
                    if member.name.endswith(".npz") and not member.problem
                ]
                if len(rows) < len(found):
                    ignored["tar members that are no .npz"] += len(found) - len(rows)
                connection.execute("BEGIN")
                connection.executemany("INSERT INTO listed VALUES (?, ?, ?, ?)", rows)
                connection.execute("COMMIT")
    # Row numbers start at 1 and have no gaps.
    connection.execute("CREATE TABLE members AS SELECT * FROM listed ORDER BY id, tar, offset")
    connection.execute("DROP TABLE listed")
    connection.execute("CREATE INDEX by_id ON members (id)")
    return connection.execute("SELECT COUNT(*) FROM members").fetchone()[0]


def _members(tar: str) -> tuple[list[TarMember], str]:
    """What a tar holds up to the place where it is damaged, and what is wrong there."""
    found: list[TarMember] = []
    try:
        found.extend(walk_tar(tar))
    except BadTar as error:
        return found, str(error)
    except Refused as error:
        return found, error.reason_for(tar)
    except OSError as error:
        return found, f"cannot be read: {error.strerror}"
    return found, ""


def _pages(entries: Iterator[MetadataEntry]) -> Iterator[list[MetadataEntry]]:
    while page := list(islice(entries, _PAGE)):
        yield page


def _look_up(
    connection: sqlite3.Connection, page: list[MetadataEntry], folders: list[frozenset[str]]
) -> Iterator[_Found | None]:
    """The member of each entry; a damaged tar that was repaired by appending may hold one twice, the last counts."""
    names = [image_stem(entry.key).rpartition("/")[2] for entry in page]
    members: dict[str, list[_Found]] = {}
    marks = ",".join("?" * len(names))
    query = f"SELECT id, rowid, tar, offset, length FROM members WHERE id IN ({marks}) ORDER BY tar, offset"
    for short, *found in connection.execute(query, names):
        members.setdefault(short, []).append((found[0], found[1], found[2], found[3]))
    known = frozenset().union(*folders)
    for entry, short in zip(page, names, strict=True):
        candidates = members.get(short, [])
        folder = entry.key.rpartition("/")[0].rpartition("/")[2]
        if folder in known:
            candidates = [found for found in candidates if folder in folders[found[1]]]
        yield candidates[-1] if candidates else None


def _claimed_twice(source: LatentTarsSource, key: str, tar: str) -> UserError:
    return UserError(
        f"{source.metadata}: '{key}' and an entry before it both have the name of one member of {tar}; put the tars "
        f"of each data set into a folder with the name that its keys begin with, such as '{key.partition('/')[0]}'"
    )

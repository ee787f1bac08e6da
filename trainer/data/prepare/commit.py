"""The last part of `prepare`: a snapshot of all shards that are written, and of what has changed of their rows."""

import os
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data.buckets import other_resolutions
from trainer.data.catalog import planned_shards
from trainer.data.catalog.catalog import BadRow, open_catalog, transaction
from trainer.data.catalog.planned_shards import PlannedShard, rows_of_shard
from trainer.data.catalog.settings import replace_file, stored_settings, sync_folder
from trainer.data.prepare.working_folder import alone, write_bad
from trainer.data.store.edits import ChangedText, edits_file, pack_edit
from trainer.data.store.mask_counts import MaskCounts
from trainer.data.store.shard_reader import OpenShard, read_captions, read_keys
from trainer.data.store.shards import ShardError, ShardInfo, count_masks, read_info
from trainer.data.store.snapshot_file import (
    Part,
    ShardEntry,
    Snapshot,
    current_snapshot,
    read_snapshot,
    snapshot_name,
    snapshot_to_json,
)
from trainer.errors import UserError

_NO_ROW = {"path": "", "key": "", "file_bytes": -1, "mtime_ns": -1, "reason": ""}


@dataclass(frozen=True)
class Committed:
    """The snapshot that is current after a commit."""

    snapshot: str
    images: int
    virtual_rows: int
    left_out: int
    """Images listed in bad.jsonl."""
    reasons: str = field(default="", compare=False)
    """The commonest of these images' reasons."""
    masks: MaskCounts | None = None
    """Of the images that this commit added; None where no masks are stored."""


def commit(prepared: Path) -> Committed:
    """Make all planned shards, and all changes of rows, part of a new snapshot, and that one current.

    Nothing to do is no error.

    Raises:
        UserError: a shard is missing or damaged, or no image is left.
    """
    settings = stored_settings(prepared)
    with alone(prepared), open_catalog(prepared) as connection:
        current = current_snapshot(prepared)
        base = read_snapshot(prepared, current) if current else Snapshot(0, (), {}, ())
        generations = planned_shards.pending_generations(connection)
        entries = _entries(prepared, planned_shards.pending_shards(connection))
        excluded = [BadRow(**_NO_ROW | row) for _, entry in entries for row in entry.info.excluded]
        with transaction(connection):
            planned_shards.leave_excluded_out(connection, excluded)
        fresh = tuple(entry for generation, entry in entries if generation not in base.generations)
        replaced = planned_shards.replaced_shards(connection)
        kept = tuple(entry for entry in base.shards if entry.name not in replaced)
        there = _at_wanted_resolutions(prepared, connection, settings, kept + fresh, replaced)
        shards = _as_they_are_now(prepared, connection, base.number + 1, there)
        if shards != base.shards or base.settings != settings:
            all_generations = (*base.generations, *(g for g in generations if g not in base.generations))
            base = Snapshot(base.number + 1, all_generations, settings, shards)
            if not any(entry.rows for entry in base.shards):
                reason = next((row["reason"] for _, entry in entries for row in entry.info.excluded), "")
                said = f"no image could be encoded; the first one {reason}" if reason else "no image is left"
                raise UserError(f"data.prepared ({prepared}): {said}")
            (prepared / "snapshots").mkdir(exist_ok=True)
            replace_file(prepared / "snapshots" / snapshot_name(base.number), snapshot_to_json(base))
            replace_file(prepared / "CURRENT", snapshot_name(base.number) + "\n")
        with transaction(connection):
            planned_shards.mark_committed(connection, generations, replaced)
            reasons = write_bad(prepared, connection)
    return Committed(
        snapshot=snapshot_name(base.number),
        images=sum(entry.rows for entry in base.shards if not entry.resolution),
        virtual_rows=sum(entry.virtual_rows for entry in base.shards if not entry.resolution),
        left_out=reasons.total,
        reasons=reasons.describe(),
        masks=count_masks([entry.info for _, entry in entries if not entry.resolution]),
    )


def _entries(prepared: Path, shards: list[PlannedShard]) -> list[tuple[int, ShardEntry]]:
    """Each shard with its generation, as its header tells it."""
    missing = sum(not (prepared / shard.name).exists() for shard in shards)
    if missing:
        raise UserError(f"data.prepared ({prepared}): {missing} of {len(shards)} shards are missing; run prepare again")
    return [
        (
            shard.generation,
            ShardEntry(
                shard.name, shard.split, shard.bucket, _info(prepared / shard.name), resolution=shard.resolution
            ),
        )
        for shard in shards
    ]


def _at_wanted_resolutions(
    prepared: Path,
    connection: sqlite3.Connection,
    settings: dict[str, Any],
    entries: Sequence[ShardEntry],
    replaced: Collection[str],
) -> tuple[ShardEntry, ...]:
    """Those that have rows, of the resolutions that are trained now; with what was encoded for one of them before."""
    wanted = {0, *(other.resolution for other in other_resolutions(settings))}
    names = {entry.name for entry in entries} | {*replaced}
    back = [
        shard
        for resolution in sorted(wanted - {0})
        for shard in planned_shards.committed_shards(connection, resolution)
        if shard.name not in names
    ]
    planned_shards.mark_dirty(connection, [shard.name for shard in back])  # nobody has followed what changed of them
    there = [*entries, *(entry for _, entry in _entries(prepared, back))]
    mains = planned_shards.main_shards(connection, replaced)
    there = [
        replace(entry, rows_of=mains[entry.name]) if entry.resolution else entry
        for entry in there
        if entry.info.rows and entry.resolution in wanted
    ]
    # Of images none of which could be encoded at the main resolution, there is no other one.
    names = {"", *(entry.name for entry in there)}
    return tuple(entry for entry in there if entry.rows_of in names)


def _info(path: Path) -> ShardInfo:
    try:
        return read_info(path)
    except ShardError as error:
        raise UserError(f"{error}; delete the file and run prepare again") from error


def _as_they_are_now(
    prepared: Path, connection: sqlite3.Connection, number: int, entries: Sequence[ShardEntry]
) -> tuple[ShardEntry, ...]:
    """The entries with their edits, written into the file of this number, and with their parts."""
    dirty = planned_shards.dirty_shards(connection) & {entry.name for entry in entries}
    planned = planned_shards.shards_by_name(connection, dirty)
    with _new_file(edits_file(prepared, number)) as file:
        done = []
        for entry in entries:
            if entry.name in planned:
                entry = _edited(prepared, connection, planned[entry.name], entry, number, file)
            elif entry.rows and not entry.parts:
                entry = replace(entry, parts=_parts_as_written(prepared, entry))
            done.append(entry)
    return tuple(done)


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that is there whole, if anything is written to it, or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    path.parent.mkdir(exist_ok=True)
    with temporary.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
        is_empty = not file.tell()
    if is_empty:
        temporary.unlink()
    else:
        temporary.replace(path)
        sync_folder(path.parent)


def _edited(
    prepared: Path,
    connection: sqlite3.Connection,
    planned: PlannedShard,
    entry: ShardEntry,
    number: int,
    file: BinaryIO,
) -> ShardEntry:
    """The entry as the catalogue's rows have it; an edit that it has already stays where it is."""
    with _opened(prepared, entry) as shard:
        keys = read_keys(shard)
        captions, repeats = read_captions(shard)
    places = {key: place for place, key in enumerate(keys)}
    # What could not be encoded has no place.
    rows = [(row, places[row.key_in_shard]) for row in rows_of_shard(connection, planned) if row.key_in_shard in places]
    rows.sort(key=lambda pair: pair[0].key)
    changed = [
        ChangedText(place, row.key, row.caption)
        for row, place in rows
        if row.key != keys[place] or row.caption.encode() != captions[place]
    ]
    parts = _parts([row.key for row, _ in rows], [row.repeats for row, _ in rows])
    is_as_written = [(place, row.repeats) for row, place in rows] == list(enumerate(repeats)) and not changed
    if is_as_written:
        return replace(entry, edit=None, parts=parts)
    changed.sort(key=lambda text: text.row)
    edit, content = pack_edit([place for _, place in rows], [row.repeats for row, _ in rows], changed)
    if entry.edit is not None and replace(edit, file=entry.edit.file, offset=entry.edit.offset) == entry.edit:
        return replace(entry, parts=parts)
    edit = replace(edit, file=number, offset=file.tell())
    file.write(content)
    return replace(entry, edit=edit, parts=parts)


@contextmanager
def _opened(prepared: Path, entry: ShardEntry) -> Iterator[OpenShard]:
    """The shard as it was written."""
    info = entry.info
    try:
        yield OpenShard(prepared / entry.name, info.rows, info.offsets, info.file_bytes, info.header_crc32c)
    except (ShardError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{prepared / entry.name}: {reason}; restore it, or prepare into another folder") from error


def _parts_as_written(prepared: Path, entry: ShardEntry) -> tuple[Part, ...]:
    with _opened(prepared, entry) as shard:
        keys = read_keys(shard)
        if keys and _source(keys[0]) == _source(keys[-1]):  # they ascend
            return (Part(_source(keys[0]), entry.info.rows, entry.info.virtual_rows),)
        return _parts(keys, shard.repeats().tolist())


def _source(key: str) -> str:
    return key.partition("/")[0]


def _parts(keys: Sequence[str], repeats: Sequence[int]) -> tuple[Part, ...]:
    """Of rows in their order."""
    of_sources = groupby(zip(keys, repeats, strict=True), key=lambda pair: _source(pair[0]))
    counts = [(name, [times for _, times in group]) for name, group in of_sources]
    return tuple(Part(name, len(times), sum(times)) for name, times in counts)

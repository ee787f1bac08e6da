"""The work of `prepare`: plan (find the images), encode (write shards, on any number of workers), commit (a snapshot).

    prepare.plan_prepare(settings)           one process, no torch
    encode.encode_shards(prepared, ...)      every worker
    prepare.commit(prepared)                 one process, no torch

Each may be killed at any moment and run again: the finished set is the same, byte for byte, however the work was
split or interrupted (the catalogue, which is a working file, aside).
"""

import fcntl
import json
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.config.sections.sources import LatentTarsSource, Source
from trainer.data.buckets import Bucket
from trainer.data.prepare import catalog
from trainer.data.prepare.catalog import BadRow, PlannedShard
from trainer.data.prepare.scan import ScanCounts, scan
from trainer.data.prepare.settings import (
    PrepareSettings,
    begin_with,
    check_settings,
    replace_file,
    store_settings,
    stored_settings,
)
from trainer.data.sources.listing import main_path
from trainer.data.store.mask_counts import MaskCounts
from trainer.data.store.shards import HEADER_BYTES, ShardError, ShardInfo, count_masks, read_info
from trainer.data.store.snapshot_file import (
    ShardEntry,
    Snapshot,
    current_snapshot,
    read_snapshot,
    snapshot_name,
    snapshot_to_json,
)
from trainer.errors import UserError

_NO_ROW = {"path": "", "key": "", "file_bytes": -1, "mtime_ns": -1, "reason": ""}

_STEERS = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What steers a terminal and JSON leaves as it is."""


@dataclass(frozen=True)
class PrepareCounts:
    """What a plan found; rows count images once, whatever their repeats."""

    scan: ScanCounts
    rows: dict[tuple[str, Bucket], int]
    new_rows: int
    empty_captions: int
    """Among the new rows."""
    masks: int | None
    """New images that have a mask; None where no source of images has masks."""
    pending_rows: int
    pending_shards: int


@dataclass(frozen=True)
class Committed:
    """The snapshot that is current after a commit."""

    snapshot: str
    images: int
    virtual_rows: int
    left_out: int
    """Images listed in bad.jsonl."""
    masks: MaskCounts | None = None
    """Of the images that this commit added; None where no masks are stored."""


def is_current(settings: PrepareSettings) -> bool:
    """Whether `settings.prepared` is complete and made with these settings. New images are not looked for.

    Raises:
        UserError: it was made with other settings.
    """
    current = current_snapshot(settings.prepared)
    if not check_settings(settings) or current is None:
        return False
    if read_snapshot(settings.prepared, current).settings != settings.to_json():
        return False
    if not (settings.prepared / "catalog.sqlite").exists():
        return True  # a set copied without its working files
    with catalog.open_catalog(settings.prepared) as connection:
        return not catalog.pending_generations(connection) and not catalog.has_open_rows(connection)


def plan_prepare(settings: PrepareSettings, show_progress: bool = True, limit: int | None = None) -> PrepareCounts:
    """Find all images, catalogue the new ones and group them into shards; what was planned before stays as it is.

    Args:
        limit: look at no more than the first so many images that each source lists.

    Raises:
        UserError: other settings than those the folder was made with, a missing source, or no usable image at all.
    """
    prepared = settings.prepared
    prepared.mkdir(parents=True, exist_ok=True)
    with _alone(prepared):
        check_settings(settings)
        with catalog.open_catalog(prepared) as connection:
            catalog.upgrade(connection)
            if not begin_with(settings):
                catalog.forget_open_rows(connection)
            counts = scan(connection, prepared, settings, show_progress, limit)
            new_rows, empty = catalog.count_new(connection)
            rows, masks = catalog.count_rows(connection), _new_masks(connection, settings)
            if rows:
                store_settings(settings)
            catalog.plan_generation(connection, settings.rows_per_shard)
            _write_bad(prepared, connection)
            pending = catalog.pending_shards(connection)
    if not rows:
        folders = ", ".join(str(main_path(source)) for source in settings.sources)
        found = f"none of {counts.listed} images can be used, see {prepared}/bad.jsonl" if counts.listed else "no image"
        raise UserError(f"data.sources ({folders}): {found}")
    return PrepareCounts(counts, rows, new_rows, empty, masks, sum(shard.rows for shard in pending), len(pending))


def _holds_latents(source: Source) -> bool:
    return isinstance(source, LatentTarsSource) or getattr(source, "latents", None) is not None


def _new_masks(connection: sqlite3.Connection, settings: PrepareSettings) -> int | None:
    in_images = any(s.masks != "none" and not _holds_latents(s) for s in settings.sources)
    return catalog.count_new_masks(connection) if in_images else None


def forget_plan(prepared: Path) -> None:
    """Drop what was planned and not begun, so that the next plan looks at the sources anew."""
    with _alone(prepared), catalog.open_catalog(prepared) as connection:
        for generation in catalog.pending_generations(connection):
            if not (prepared / f"shards/{generation:06d}").exists():
                catalog.forget_generation(connection, generation)
        if current_snapshot(prepared) is None and not catalog.pending_generations(connection):
            (prepared / "settings.json").unlink(missing_ok=True)


def plan_repack(prepared: Path) -> tuple[int, int]:
    """Plan shards with the latents to which the committed ones only refer; returns pending rows and shards.

    Call it when nothing else is pending. The shards that refer stay on disk, for runs that began with them.
    """
    with _alone(prepared), catalog.open_catalog(prepared) as connection:
        if not catalog.pending_generations(connection):
            catalog.plan_repack(connection, stored_settings(prepared)["data.rows_per_shard"])
        pending = catalog.pending_shards(connection)
    return sum(shard.rows for shard in pending), len(pending)


def commit(prepared: Path) -> Committed:
    """Make all planned shards part of a new snapshot, and that one current; nothing to do is no error.

    Raises:
        UserError: a shard is missing or damaged, or no image could be encoded.
    """
    settings = stored_settings(prepared)
    with _alone(prepared), catalog.open_catalog(prepared) as connection:
        current = current_snapshot(prepared)
        base = read_snapshot(prepared, current) if current else Snapshot(0, (), {}, ())
        generations = catalog.pending_generations(connection)
        entries = _entries(prepared, catalog.pending_shards(connection))
        fresh = tuple(entry for generation, entry in entries if generation not in base.generations)
        replaced = catalog.replaced_shards(connection)
        if fresh or base.settings != settings:
            all_generations = (*base.generations, *(g for g in generations if g not in base.generations))
            kept = tuple(entry for entry in base.shards if entry.name not in replaced)
            base = Snapshot(base.number + 1, all_generations, settings, kept + fresh)
            if not any(entry.info.rows for entry in base.shards):
                reason = next((row["reason"] for _, entry in entries for row in entry.info.excluded), "")
                raise UserError(f"data.prepared ({prepared}): no image could be encoded; the first one {reason}")
            (prepared / "snapshots").mkdir(exist_ok=True)
            replace_file(prepared / "snapshots" / snapshot_name(base.number), snapshot_to_json(base))
            replace_file(prepared / "CURRENT", snapshot_name(base.number) + "\n")
        with catalog.transaction(connection):
            excluded = [BadRow(**_NO_ROW | row) for _, entry in entries for row in entry.info.excluded]
            catalog.mark_committed(connection, generations, excluded, replaced)
            left_out = _write_bad(prepared, connection)
    infos = [entry.info for entry in base.shards]
    return Committed(
        snapshot=snapshot_name(base.number),
        images=sum(info.rows for info in infos),
        virtual_rows=sum(info.virtual_rows for info in infos),
        left_out=left_out,
        masks=count_masks([entry.info for _, entry in entries]),
    )


def progress(prepared: Path) -> tuple[int, int]:
    """(rows encoded, rows planned) of the pending shards, from file names and sizes alone; for a progress bar."""
    with catalog.open_catalog(prepared, read_only=True) as connection:
        shards = catalog.pending_shards(connection)
    done = 0
    sizes: dict[str, int] = {}
    for generation in {shard.generation for shard in shards}:
        folder = f"shards/{generation:06d}"
        if (prepared / folder).is_dir():
            with os.scandir(prepared / folder) as files:
                sizes |= {f"{folder}/{file.name}": _size(file) for file in files}
    for shard in shards:
        if shard.name in sizes:
            done += shard.rows
        else:
            written = sizes.get(shard.name + ".tmp", 0) - HEADER_BYTES
            row_bytes = 8 * (shard.bucket.height_px // 8) * (shard.bucket.width_px // 8)
            done += max(0, min(shard.rows, written // row_bytes))
    return done, sum(shard.rows for shard in shards)


def _size(file: "os.DirEntry[str]") -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0  # renamed since it was listed


def _entries(prepared: Path, shards: list[PlannedShard]) -> list[tuple[int, ShardEntry]]:
    """Each shard with its generation, as its header tells it."""
    missing = sum(not (prepared / shard.name).exists() for shard in shards)
    if missing:
        raise UserError(f"data.prepared ({prepared}): {missing} of {len(shards)} shards are missing; run prepare again")
    return [
        (shard.generation, ShardEntry(shard.name, shard.split, shard.bucket, _info(prepared / shard.name)))
        for shard in shards
    ]


def _info(path: Path) -> ShardInfo:
    try:
        return read_info(path)
    except ShardError as error:
        raise UserError(f"{error}; delete the file and run prepare again") from error


def _write_bad(prepared: Path, connection: sqlite3.Connection) -> int:
    """List all images that are left out in bad.jsonl; returns their number. There may be millions."""
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for row in catalog.bad_rows(connection):
            count += 1
            line = json.dumps({"path": row.path, "key": row.key, "reason": row.reason}, ensure_ascii=False)
            yield _STEERS.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n"

    replace_file(prepared / "bad.jsonl", lines())
    return count


@contextmanager
def _alone(prepared: Path) -> Iterator[None]:
    """No other process plans or commits in this folder meanwhile."""
    fd = os.open(prepared / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"data.prepared ({prepared}): another process is preparing this folder") from None
    finally:
        os.close(fd)

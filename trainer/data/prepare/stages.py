"""The work of `prepare`: plan (find the images), encode (write shards, on any number of workers), commit (a snapshot).

    prepare.plan_prepare(settings)           one process, no torch
    encode.encode_shards(prepared, ...)      every worker
    commit.commit(prepared)                  one process, no torch

Each may be killed at any moment and run again: the finished set is the same, byte for byte, however the work was
split or interrupted (the catalogue, which is a working file, aside).
"""

import os
import sqlite3
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from trainer.config.sections.data.sources import LatentTarsSource, Source
from trainer.data.buckets import Bucket
from trainer.data.catalog import catalog, planned_shards
from trainer.data.catalog.planned_shards import (
    forget_generation,
    pending_generations,
    pending_shards,
    plan_generation,
)
from trainer.data.catalog.reasons import Reasons
from trainer.data.catalog.scan import Removed, scan
from trainer.data.catalog.scan_counts import ScanCounts
from trainer.data.catalog.settings import (
    PrepareSettings,
    begin_with,
    check_settings,
    moves_of,
    replace_file,
    store_settings,
    stored_settings,
)
from trainer.data.prepare.near_duplicates import leave_near_duplicates_out
from trainer.data.prepare.working_folder import LEFT_OUT, alone, write_bad, write_left_out
from trainer.data.sources.listing import main_path
from trainer.data.store.moves import moves_file, note_moves
from trainer.data.store.shards import HEADER_BYTES, read_info
from trainer.data.store.snapshot_file import current_snapshot, read_snapshot
from trainer.errors import UserError


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
    reasons: Reasons
    """Why images cannot be used."""
    pending_rows: int
    pending_shards: int
    pending_at: dict[int, int]
    """Rows that are to be encoded at each further resolution, where there is one."""


def is_current(settings: PrepareSettings) -> bool:
    """Whether `settings.prepared` is complete and made with these settings. New images are not looked for.

    Raises:
        UserError: it was made with other settings.
    """
    current, is_same = current_snapshot(settings.prepared), check_settings(settings)
    if current is not None and not (settings.prepared / "catalog.sqlite").exists():
        return True  # a set copied without its working files, which stays as it is
    if not is_same or current is None:
        return False
    if read_snapshot(settings.prepared, current).settings != settings.to_json():
        return False
    with catalog.open_catalog(settings.prepared) as connection:
        return not pending_generations(connection) and not catalog.has_open_rows(connection)


def plan_prepare(
    settings: PrepareSettings,
    show_progress: bool = True,
    limit: int | None = None,
    removed: Removed = "ask",
    look_again: bool = False,
) -> PrepareCounts:
    """Find all images, catalogue what is new of them and what has changed, and group the new ones into shards.

    What was planned before stays as it is.

    Args:
        limit: look at no more than the first so many images that each source lists.
        removed: what becomes of images that are not there any more.
        look_again: look at the sources even if nothing of them can have changed.

    Raises:
        UserError: other settings than those the folder was made with, a missing source, more than 5 % of a source
            missing, or no usable image at all.
    """
    prepared = settings.prepared
    prepared.mkdir(parents=True, exist_ok=True)
    with alone(prepared):
        check_settings(settings)
        with catalog.open_catalog(prepared) as connection:
            catalog.upgrade(connection)
            _require_catalogued(prepared, connection)
            if not begin_with(settings):
                catalog.forget_open_rows(connection)
            counts = scan(connection, prepared, settings, show_progress, limit, removed, look_again)
            leave_near_duplicates_out(connection, settings, counts, show_progress)
            new_rows, empty = catalog.count_new(connection)
            rows, masks = catalog.count_rows(connection), _new_masks(connection, settings)
            if rows:
                if (text := note_moves(prepared, moves_of(settings))) is not None:
                    replace_file(moves_file(prepared), text)
                store_settings(settings)
            if counts.kept and settings.also_at:
                _require_no_more(connection, settings, counts)
            plan_generation(connection, settings.rows_per_shard, settings.elsewhere_of if settings.also_at else None)
            reasons = write_bad(prepared, connection)
            write_left_out(prepared, connection)
            pending = pending_shards(connection)
    if not rows:
        folders = ", ".join(str(main_path(source)) for source in settings.sources)
        found = f"none of {counts.listed} images can be used, see {prepared}/bad.jsonl" if counts.listed else "no image"
        if counts.filtered:
            found = f"data.filters leaves none of {counts.listed} images, see {prepared}/{LEFT_OUT}"
        raise UserError(f"data.sources ({folders}): {found}")
    at: Counter[int] = Counter()
    for shard in pending:
        at[shard.resolution] += shard.rows
    further = {other.resolution: at[other.resolution] for other in settings.also_at}
    return PrepareCounts(counts, rows, new_rows, empty, masks, reasons, at.total(), len(pending), further)


def _require_no_more(connection: sqlite3.Connection, settings: PrepareSettings, counts: ScanCounts) -> None:
    """UserError where images that are not there any more would have to be encoded at a further resolution."""
    lacking = planned_shards.lacks_resolution(connection, settings.elsewhere_of)
    if lacking is not None:
        raise UserError(
            f"data.buckets.also_at: {counts.kept:,} images that are kept are not there any more, such as "
            f"{counts.first_kept}, and cannot be encoded at {lacking} px; put them back, or prepare without "
            "--keep-removed"
        )


def _require_catalogued(prepared: Path, connection: sqlite3.Connection) -> None:
    """UserError where there is a set of which the catalogue knows nothing: what is in its shards cannot be told."""
    if current_snapshot(prepared) is not None and catalog.open_generation(connection) == 1:
        raise UserError(
            f"data.prepared ({prepared}): its catalog.sqlite is missing, so that the set can be trained on, but not be "
            "changed; copy that file too, or prepare into another folder"
        )


def _holds_latents(source: Source) -> bool:
    return isinstance(source, LatentTarsSource) or getattr(source, "latents", None) is not None


def _new_masks(connection: sqlite3.Connection, settings: PrepareSettings) -> int | None:
    in_images = any(s.masks != "none" and not _holds_latents(s) for s in settings.sources)
    return catalog.count_new_masks(connection) if in_images else None


def forget_plan(prepared: Path) -> None:
    """Drop what was planned and not begun, so that the next plan looks at the sources anew."""
    with alone(prepared), catalog.open_catalog(prepared) as connection:
        for generation in pending_generations(connection):
            if not (prepared / f"shards/{generation:06d}").exists():
                forget_generation(connection, generation)
        if current_snapshot(prepared) is None and not pending_generations(connection):
            (prepared / "settings.json").unlink(missing_ok=True)


def plan_repack(prepared: Path) -> tuple[int, int]:
    """Plan shards with the latents to which the committed ones only refer; returns pending rows and shards.

    Call it when nothing else is pending. The shards that refer stay on disk, for runs that began with them.
    """
    with alone(prepared), catalog.open_catalog(prepared) as connection:
        if not pending_generations(connection):
            planned_shards.plan_repack(connection, stored_settings(prepared)["data.rows_per_shard"])
        pending = pending_shards(connection)
    return sum(shard.rows for shard in pending), len(pending)


def progress(prepared: Path) -> tuple[int, int]:
    """(rows encoded, rows planned) of the pending shards, from file names and sizes alone; for a progress bar."""
    with catalog.open_catalog(prepared, read_only=True) as connection:
        shards = pending_shards(connection)
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


def unusable_so_far(prepared: Path, known: dict[str, tuple[int, int]]) -> tuple[int, int]:
    """(images that could not be encoded, images tried) of the pending shards that are whole by now.

    Args:
        known: what was found before, by shard; is added to, so that each shard's header is read once.
    """
    with catalog.open_catalog(prepared, read_only=True) as connection:
        shards = pending_shards(connection)
    for shard in shards:
        if shard.name not in known and (prepared / shard.name).exists():
            known[shard.name] = len(read_info(prepared / shard.name).excluded), shard.rows
    found = [known[shard.name] for shard in shards if shard.name in known]
    return sum(excluded for excluded, _ in found), sum(rows for _, rows in found)


def _size(file: "os.DirEntry[str]") -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0  # renamed since it was listed

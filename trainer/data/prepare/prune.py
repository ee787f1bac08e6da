"""Giving back the disk space of images that are gone: shards of which less than half counts are written anew, and those
of further resolutions that hold the text, which is with the main one.

Each of them becomes one smaller shard, with the same checksums as it was read with; then what no snapshot needs any
more is deleted, and with it the older snapshots, which need it.
"""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.catalog import planned_shards
from trainer.data.catalog.catalog import CatalogRow, open_catalog
from trainer.data.catalog.planned_shards import PlannedShard
from trainer.data.prepare.working_folder import alone
from trainer.data.store.edits import edits_file
from trainer.data.store.shard_reader import OpenShard, read_keys, read_row
from trainer.data.store.shards import EncodeText, RowBatch, ShardError, ShardHead, ShardInfo, read_info
from trainer.data.store.snapshot_file import ShardEntry, current_snapshot, read_snapshot
from trainer.errors import UserError

_AT_ONCE = 32


@dataclass(frozen=True)
class Pruned:
    """What was given back."""

    files: int
    num_bytes: int
    snapshots: int
    """Older ones that are deleted."""


def plan_prune(prepared: Path) -> int:
    """Plan the copies of shards of which less than half counts; returns how many rows they hold.

    Call it when nothing else is pending. What of these shards does not count is forgotten.
    """
    with alone(prepared), open_catalog(prepared) as connection:
        name = current_snapshot(prepared)
        if name is not None and not planned_shards.pending_generations(connection):
            sparse = [entry.name for entry in read_snapshot(prepared, name).shards if _is_sparse(entry)]
            planned_shards.plan_copies(connection, sparse)
        return sum(shard.rows for shard in planned_shards.pending_shards(connection))


def _is_sparse(entry: ShardEntry) -> bool:
    holds_text_again = entry.resolution > 0 and entry.info.text_shape is not None
    return (2 * entry.rows < entry.info.rows or holds_text_again) and entry.info.offsets["latents"] >= 0


class CopiedRows:
    """The rows of a planned copy, from the shard that it replaces."""

    def __init__(self, prepared: Path, connection: sqlite3.Connection, shard: PlannedShard) -> None:
        """Opens it; UserError where it is not there or not as it was written."""
        self._path = prepared / planned_shards.source_of_copy(connection, shard)
        with self._told():
            self._info = read_info(self._path)
            self._shard = _open(self._path, self._info)
            self._places = {key: place for place, key in enumerate(read_keys(self._shard))}
        self._text_shape = None if shard.resolution else self._info.text_shape
        self._texts: list[tuple[np.ndarray, np.ndarray]] = []

    @property
    def has_masks(self) -> bool:
        """Whether rows have masks."""
        return self._info.offsets["masks"] >= 0

    @property
    def encode_text(self) -> EncodeText | None:
        """Gives the stored outputs of the text encoders, in the order of the rows."""
        if self._text_shape is None:
            return None

        def stored(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
            texts, self._texts = self._texts[: len(captions)], self._texts[len(captions) :]
            return np.stack([hidden for hidden, _ in texts]), np.stack([pooled for _, pooled in texts])

        return stored  # pyright: ignore[reportReturnType]

    def batches(self, rows: list[CatalogRow], head: ShardHead) -> Iterator[RowBatch]:
        """The rows in their order, as the catalogue has them now, with the stored latents and masks."""
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            latents = np.empty((len(some), *head.latent_shape), dtype=np.float16)
            masks = np.empty((len(some), *head.latent_shape[1:]), dtype=np.uint8) if self.has_masks else None
            sizes = np.empty((len(some), 6), dtype=np.uint32)
            for i, row in enumerate(some):
                text = self._text_buffer()
                with self._told():
                    place = self._places[row.key_in_shard]
                    mask = None if masks is None else masks[i]
                    sizes[i] = read_row(self._shard, place, latents[i], text, None, mask).sizes
                if text is not None:
                    self._texts.append(text)
            yield RowBatch(
                latents=latents,
                captions=[row.caption for row in some],
                keys=[row.key_in_shard for row in some],
                sizes=sizes,
                repeats=np.array([row.repeats for row in some], dtype=np.uint32),
                masks=masks,
            )

    def _text_buffer(self) -> tuple[np.ndarray, np.ndarray] | None:
        if self._text_shape is None:
            return None
        positions, width, pooled_width = self._text_shape
        return np.empty((positions, width), dtype=np.float16), np.empty(pooled_width, dtype=np.float16)

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (ShardError, OSError, KeyError) as error:
            reason = (
                error.strerror
                if isinstance(error, OSError)
                else "lacks a row"
                if isinstance(error, KeyError)
                else error
            )
            raise UserError(
                f"{self._path}: cannot be written anew: {reason}; `sdxl-train verify` tells more"
            ) from error


def _open(path: Path, info: ShardInfo) -> OpenShard:
    return OpenShard(path, info.rows, info.offsets, info.file_bytes, info.header_crc32c)


def delete_unused(prepared: Path) -> Pruned:
    """Delete every file that the newest snapshot does not need, and the older snapshots."""
    with alone(prepared):
        current = current_snapshot(prepared)
        if current is None:
            return Pruned(0, 0, 0)
        entries = read_snapshot(prepared, current).shards
        needed = {prepared / "snapshots" / current, *(prepared / entry.name for entry in entries)}
        needed |= {(prepared / entry.name).with_suffix(".images") for entry in entries}
        needed |= {edits_file(prepared, entry.edit.file) for entry in entries if entry.edit is not None}
        snapshots = sorted(path for path in (prepared / "snapshots").glob("*.json") if path not in needed)
        for path in snapshots:  # first: none is to name what is not there
            path.unlink()
        files = [path for kind in ("shards/*/*", "edits/*") for path in prepared.glob(kind) if path not in needed]
        num_bytes = sum(path.stat().st_blocks * 512 for path in files)
        with open_catalog(prepared) as connection:
            planned_shards.forget_unlisted(connection, {entry.name for entry in entries})
        for path in files:
            path.unlink()
        for folder in prepared.glob("shards/*"):
            if not any(folder.iterdir()):
                folder.rmdir()
    return Pruned(len(files), num_bytes, len(snapshots))

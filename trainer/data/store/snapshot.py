"""A prepared data set as one snapshot lists it: which shards there are, and any row of them by its number.

Nothing is held per image: a snapshot of 12 million rows is some 6,000 shards' worth of small integers.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.augment import ChooseView, View, centred_view
from trainer.data.buckets import Bucket, Placement
from trainer.data.store.bucket_groups import groups_of
from trainer.data.store.edits import Edit, EditFile, OpenEdit, edits_file
from trainer.data.store.moves import read_moves
from trainer.data.store.references import ReferencedFiles
from trainer.data.store.rows import RowProblem, Rows
from trainer.data.store.shard_reader import (
    OpenShard,
    PayloadError,
    RowRecord,
    read_captions,
    read_record,
    read_row,
    read_text_elsewhere,
)
from trainer.data.store.shards import LATENT_CHANNELS, LATENT_FACTOR, SECTIONS, ShardError, ShardInfo
from trainer.data.store.snapshot_file import ShardEntry, current_snapshot, read_snapshot
from trainer.errors import UserError

SPLITS = ("train", "validation")
OPEN_FILES = 256
"""Shards that a process keeps open; well below the usual limit of 1,024 descriptors."""
_OPEN_EDITS = 64

_ROWS, _VIRTUAL_ROWS, _UNIFORM_REPEATS, _FILE_ROWS, _FILE_BYTES, _HEADER_CRC = range(6)  # columns of PreparedSet._facts
_LATENTS, _HIDDEN = map(SECTIONS.index, ("latents", "text_hidden"))  # columns of PreparedSet._offsets


@dataclass(frozen=True)
class ShardSummary:
    """One shard of an open prepared set; `name` is relative to the prepared folder."""

    index: int
    name: str
    split: str
    bucket_index: int
    rows: int
    virtual_rows: int
    file_bytes: int
    resolution: int = 0
    """0: the main one."""


class PreparedSet:
    """Random reads of a prepared data set. Safe to use from several threads; pickles as its path and snapshot name."""

    def __init__(self, prepared: Path, snapshot_name: str) -> None:
        self.path = prepared
        self.snapshot_name = snapshot_name
        snapshot = read_snapshot(prepared, snapshot_name)
        self.settings = snapshot.settings
        self.text_shape = next((shard.info.text_shape for shard in snapshot.shards if shard.info.text_shape), None)
        """(positions, width of hidden states, width of pooled) of the cached text outputs, where there are any."""
        self._names = [shard.name for shard in snapshot.shards]
        # Arrays in place of an object per shard: a tenth of the memory.
        self._facts = np.array([_facts(shard) for shard in snapshot.shards], dtype=np.int64)
        self._edits = {number: shard.edit for number, shard in enumerate(snapshot.shards) if shard.edit is not None}
        self._edit_files: OrderedDict[int, EditFile] = OrderedDict()
        self._offsets = np.array([_offsets(shard.info) for shard in snapshot.shards], dtype=np.int64)
        self._groups = {split: groups_of(snapshot.shards, split) for split in SPLITS}
        self._resolutions = [shard.resolution for shard in snapshot.shards]
        self._text_in = _text_in(snapshot.shards) if self.text_shape else {}
        main = [shard for shard in snapshot.shards if not shard.resolution]
        self._images = {split: sum(s.rows for s in main if s.split == split) for split in SPLITS}
        self._open: OrderedDict[int, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self._files = ReferencedFiles(read_moves(prepared))

    @classmethod
    def open(cls, prepared: Path, snapshot_name: str | None = None) -> "PreparedSet":
        """Open the newest snapshot, or the named one (a resumed run stays with the one it began with)."""
        name = snapshot_name or current_snapshot(prepared)
        if name is None:
            raise UserError(
                f"data.prepared ({prepared}): holds no prepared data set; make it with `sdxl-train prepare`"
            )
        return cls(prepared, name)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.snapshot_name)

    def buckets(self, split: str) -> list[Bucket]:
        """The buckets that have rows, sorted by height, then width; `read` takes an index into this list."""
        return [group.bucket for group in self._groups[split]]

    def rows_per_bucket(self, split: str) -> list[int]:
        """Virtual rows (an image of r repeats counts r times) of each of `buckets(split)`, at the main resolution;
        those of others follow them."""
        return [group.main_rows for group in self._groups[split]]

    def parts_per_bucket(self, split: str) -> list[Sequence[tuple[str, int, int]]]:
        """Of each of `buckets(split)` the stretches of rows that are of one source: its name, the first virtual row,
        and how many there are; at the main resolution."""
        return [group.parts for group in self._groups[split]]

    @property
    def has_other_resolutions(self) -> bool:
        """Whether images to train on are held at more than one."""
        return any(self._resolutions)

    @property
    def scaling_factor(self) -> float:
        """What the UNet sees are the stored latents times this. UserError where the snapshot does not tell."""
        factor = self.settings.get("the VAE's scaling_factor")
        if not isinstance(factor, float | int) or not 0 < factor < float("inf"):
            raise UserError(f"{self.path}/snapshots/{self.snapshot_name}: has no scaling factor of a VAE")
        return factor

    def images(self, split: str) -> int:
        """Images of the split, each counted once."""
        return self._images[split]

    def shards(self, split: str, at_all_resolutions: bool = False) -> list[ShardSummary]:
        """The shards of a split that have rows, by bucket; of the main resolution, or all."""
        return [
            ShardSummary(
                index,
                self._names[index],
                split,
                bucket_index,
                int(self._facts[index, _ROWS]),
                int(self._facts[index, _VIRTUAL_ROWS]),
                int(self._facts[index, _FILE_BYTES]),
                self._resolutions[index],
            )
            for bucket_index, group in enumerate(self._groups[split])
            for index in group.shards.tolist()
            if at_all_resolutions or not self._resolutions[index]
        ]

    def missing(self) -> list[tuple[str, int]]:
        """A line for each shard that is not there or has another size than was written, and how many images it holds;
        a stat per shard."""
        sizes = [_size(self.path / name) for name in self._names]
        return [
            (
                f"{name}: is missing" if size < 0 else f"{name}: has {size} bytes in place of {facts[_FILE_BYTES]}",
                int(facts[_ROWS]),
            )
            for name, size, facts in zip(self._names, sizes, self._facts, strict=True)
            if size != facts[_FILE_BYTES]
        ]

    @property
    def holds_images(self) -> bool:
        """Whether rows are images, decoded anew at each read, and not latents."""
        return self.settings.get("data.mode") == "images"

    @property
    def has_masks(self) -> bool:
        """Whether it was prepared with masks, of all images or some."""
        sources = self.settings.get("data.sources", ())
        return any(isinstance(source, dict) and source.get("masks", "none") != "none" for source in sources)

    def payload_shape(self, split: str, bucket_index: int) -> tuple[tuple[int, int, int], np.dtype]:
        """Shape and dtype of one row's latents, or pixels, of a bucket."""
        bucket = self._groups[split][bucket_index].bucket
        if self.holds_images:
            return (3, bucket.height_px, bucket.width_px), np.dtype(np.uint8)
        shape = (LATENT_CHANNELS, bucket.height_px // LATENT_FACTOR, bucket.width_px // LATENT_FACTOR)
        return shape, np.dtype(np.float16)

    def mask_shape(self, split: str, bucket_index: int) -> tuple[int, int]:
        """Of one row's mask, u8, in a bucket: that of its latents."""
        bucket = self._groups[split][bucket_index].bucket
        return bucket.height_px // LATENT_FACTOR, bucket.width_px // LATENT_FACTOR

    def read(
        self,
        split: str,
        bucket_index: int,
        ids: np.ndarray,
        payload: np.ndarray | None = None,
        choose_view: ChooseView = centred_view,
        with_masks: bool = False,
    ) -> Rows:
        """Read virtual rows of one bucket; a row that is damaged or cannot be read never raises.

        Args:
            ids: int64 [m] in 0..rows_per_bucket, or of other resolutions as `stretches` tells; -1 is padding.
            payload: latents or pixels are read into it (such as a view of pinned memory), contiguous, [m, *shape] as
                `payload_shape` tells; default: a new array.
            choose_view: of each image, from its key, the repeat and its view at the centre.
            with_masks: read them as well.
        """
        group = self._groups[split][bucket_index]
        ids = np.asarray(ids, dtype=np.int64)
        if len(ids) and not (ids.min() >= -1 and ids.max() < group.starts[-1]):
            raise IndexError(f"row ids {ids.min()}..{ids.max()} of a bucket of {group.starts[-1]} rows")
        places = np.searchsorted(group.starts, ids, side="right") - 1
        within = np.where(ids < 0, -1, ids - group.starts[places])
        if payload is None:
            shape, dtype = self.payload_shape(split, bucket_index)
            payload = np.empty((len(ids), *shape), dtype=dtype)
        mask_shape = (len(ids), *self.mask_shape(split, bucket_index))
        masks = np.zeros(mask_shape, dtype=np.uint8) if with_masks else None
        return self._read(payload, masks, group.shards[places].tolist(), within.tolist(), choose_view)

    def read_shard(self, shard: ShardSummary, rows: range) -> Rows:
        """Read rows by their number among those of one shard that count, each in its first repeat, with their masks;
        otherwise like `read`."""
        uniform = int(self._facts[shard.index, _UNIFORM_REPEATS])
        within = [row * uniform for row in rows]
        if not uniform:
            try:
                ends = self._shard(shard.index).ends_of_repeats(shard.virtual_rows)
                within = [int(ends[row - 1]) if row else 0 for row in rows]
            except (ShardError, OSError):
                pass  # each row will tell
        shape, dtype = self.payload_shape(shard.split, shard.bucket_index)
        payload = np.empty((len(rows), *shape), dtype=dtype)
        mask_shape = (len(rows), *self.mask_shape(shard.split, shard.bucket_index))
        masks = np.zeros(mask_shape, dtype=np.uint8) if self.has_masks else None
        return self._read(payload, masks, [shard.index] * len(rows), within, centred_view)

    def _read(
        self,
        payload: np.ndarray,
        masks: np.ndarray | None,
        shards: list[int],
        within: list[int],
        choose_view: ChooseView,
    ) -> Rows:
        """Virtual row `within[i]` of the shard `shards[i]` into `payload[i]`, for each i; -1 is padding."""
        m = len(payload)
        rows = Rows(
            latents=None if self.holds_images else payload,
            pixels=payload if self.holds_images else None,
            captions=[""] * m,
            keys=[""] * m,
            repeat=np.zeros(m, dtype=np.int64),
            sizes=np.zeros((m, 6), dtype=np.int64),
            ok=np.zeros(m, dtype=bool),
            text_hidden=self._text_buffer(m, hidden=True),
            text_pooled=self._text_buffer(m, hidden=False),
            problems=[],
            masks=masks,
        )
        for i in range(m):
            if within[i] < 0 or not self._read_one(rows, i, payload[i], shards[i], within[i], choose_view):
                payload[i] = 0
        return rows

    def read_record(self, split: str, bucket_index: int, virtual_row: int) -> RowRecord | None:
        """The key, caption and sizes of one virtual row, without its payload; None where they cannot be read."""
        group = self._groups[split][bucket_index]
        place = int(np.searchsorted(group.starts, virtual_row, side="right")) - 1
        shard_index = int(group.shards[place])
        try:
            shard = self._shard(shard_index)
            return read_record(shard, self._row_of(shard, shard_index, virtual_row - int(group.starts[place]))[0])
        except (ShardError, OSError):
            return None

    def read_captions(self, shard: ShardSummary) -> tuple[list[bytes], list[int]]:
        """All caption records of a shard and the rows' repeats; raises as `shard_reader.read_captions` does."""
        return read_captions(self._shard(shard.index))

    def _text_buffer(self, m: int, hidden: bool) -> np.ndarray | None:
        if self.text_shape is None:
            return None
        positions, hidden_width, pooled_width = self.text_shape
        return np.zeros((m, positions, hidden_width) if hidden else (m, pooled_width), dtype=np.float16)

    def _read_one(
        self, rows: Rows, i: int, payload: np.ndarray, shard_index: int, virtual: int, choose_view: ChooseView
    ) -> bool:
        """Fill place i; on a mismatch drop what the kernel has cached and read once more, then give the row up."""
        row = self._uniform_row(shard_index, virtual)
        file, offset, reason = self._names[shard_index], -1, ""
        text = None
        if rows.text_hidden is not None and rows.text_pooled is not None:
            text = (rows.text_hidden[i], rows.text_pooled[i])
        mask = None if rows.masks is None else rows.masks[i]
        text_in = self._text_in.get(shard_index)
        at, nbytes = shard_index, payload.nbytes
        for _ in range(2):
            at, nbytes = shard_index, payload.nbytes
            try:
                shard = self._shard(shard_index)
                row, repeat = self._row_of(shard, shard_index, virtual)

                def choose_place(key: str, centred: Placement, repeat: int = repeat) -> View:
                    return choose_view(key, repeat, centred)

                record = read_row(shard, row, payload, text if text_in is None else None, choose_place, mask)
                if text is not None and text_in is not None:
                    at, nbytes, of_image = text_in, text[0].nbytes, row
                    main = self._shard(text_in)
                    row = self._row_of(main, text_in, virtual)[0]
                    read_text_elsewhere(main, row, text, shard, of_image)
            except PayloadError as error:
                file, offset, reason = error.reference.file, error.reference.offset, str(error)
                self._files.forget(error.reference)
                continue
            except (ShardError, OSError) as error:
                file, offset, reason = self._names[at], -1, str(error)
                self._forget(at)
                continue
            rows.captions[i], rows.keys[i], rows.sizes[i] = record.caption, record.key, record.sizes
            rows.repeat[i], rows.ok[i] = repeat, True
            return True
        for output in (*(text or ()), *(() if mask is None else (mask,))):
            output[:] = 0
        begin = int(self._offsets[at, _LATENTS if at == shard_index else _HIDDEN])
        if row >= 0 and offset < 0 <= begin:
            offset = begin + row * nbytes
        rows.problems.append(RowProblem(file, row, offset, reason))
        return False

    def _uniform_row(self, shard_index: int, virtual: int) -> int:
        """The row, as far as it can be told without opening the shard; else -1."""
        uniform = int(self._facts[shard_index, _UNIFORM_REPEATS])
        return virtual // uniform if uniform and shard_index not in self._edits else -1

    def _row_of(self, shard: OpenShard, shard_index: int, virtual: int) -> tuple[int, int]:
        """Its number in the shard, and which of its repeats it is."""
        uniform = int(self._facts[shard_index, _UNIFORM_REPEATS])
        if uniform:
            place, repeat = divmod(virtual, uniform)
        else:
            ends = shard.ends_of_repeats(int(self._facts[shard_index, _VIRTUAL_ROWS]))
            place = int(np.searchsorted(ends, virtual, side="right"))
            repeat = virtual - (int(ends[place - 1]) if place else 0)
        return place if shard.edit is None else int(shard.edit.rows[place]), repeat

    def _shard(self, index: int) -> OpenShard:
        with self._lock:
            shard = self._open.get(index)
            if shard is not None:
                self._open.move_to_end(index)
                return shard
        _, _, _, rows, file_bytes, header_crc = self._facts[index].tolist()
        offsets = dict(zip(SECTIONS, self._offsets[index].tolist(), strict=True))
        # Not a Path: it would intern each name, and the table of interned strings would double, by megabytes.
        path = f"{self.path}/{self._names[index]}"
        edit = self._edits.get(index)
        opened = None if edit is None else self._open_edit(edit, rows)
        shard = OpenShard(path, rows, offsets, file_bytes, header_crc, self._files, opened)
        with self._lock:
            self._open[index] = shard
            # An evicted shard is closed when no thread reads from it any more: its last reference closes it.
            while len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        return shard

    def _open_edit(self, edit: Edit, shard_rows: int) -> OpenEdit:
        with self._lock:
            file = self._edit_files.get(edit.file)
            if file is None:
                file = self._edit_files[edit.file] = EditFile(edits_file(self.path, edit.file))
                while len(self._edit_files) > _OPEN_EDITS:
                    self._edit_files.popitem(last=False)
            self._edit_files.move_to_end(edit.file)
        return OpenEdit(edit, file, shard_rows)

    def _forget(self, index: int) -> None:
        with self._lock:
            shard = self._open.pop(index, None)
        if shard is not None:
            os.posix_fadvise(shard.fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _text_in(shards: Sequence[ShardEntry]) -> dict[int, int]:
    """Of shards of further resolutions that hold no text, by their places, that of the one which holds it."""
    places = {shard.name: place for place, shard in enumerate(shards) if not shard.resolution}
    lacking = ((place, shard) for place, shard in enumerate(shards) if shard.resolution and not shard.info.text_shape)
    return {place: places[shard.rows_of] for place, shard in lacking}


def _facts(shard: ShardEntry) -> tuple[int, ...]:
    counts = shard.rows, shard.virtual_rows, shard.uniform_repeats
    return *counts, shard.info.rows, shard.info.file_bytes, shard.info.header_crc32c


def _offsets(info: ShardInfo) -> list[int]:
    return [info.offsets[name] for name in SECTIONS]

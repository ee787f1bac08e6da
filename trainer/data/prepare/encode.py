"""The second part of `prepare`: write the planned shards.

Images are decoded, resized and encoded, referenced latents are converted, and of what is used where it lies only the
place is written.

Any number of workers do this at once; they share nothing but the file system. Each may be killed at any moment.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.catalog import catalog
from trainer.data.catalog.catalog import CatalogRow, Payload
from trainer.data.catalog.planned_shards import PlannedShard, pending_shards, rows_of_shard
from trainer.data.catalog.settings import stored_settings, sync_folder
from trainer.data.fork_server import fork_server, take_signals
from trainer.data.images import pillow_rules
from trainer.data.masks import FULL, BadMask
from trainer.data.prepare.decode import decoded, excluded_row, packed, temporary
from trainer.data.prepare.prune import CopiedRows
from trainer.data.store.npz import BadNpz
from trainer.data.store.references import Reference, ReferencedFiles
from trainer.data.store.shard_reader import read_npz
from trainer.data.store.shards import EncodeText, RowBatch, ShardHead, write_shard
from trainer.errors import UserError
from trainer.guards import Refused
from trainer.keyed import draw_seed

Encode = Callable[[np.ndarray, np.ndarray], Any]
"""(pixels u8 [B, 3, H, W], draw seeds int64 [B]) -> unscaled latents [B, 4, H/8, W/8].

The result is an array or a CPU tensor. A row's noise must follow from its seed alone.
"""

AS_GIVEN = "as given"
"""Stands for the VAE of latents that were not made here."""

_POLL_SECONDS = 0.2
_CONVERTED_AT_ONCE = 32
_ROWS_WORTH_A_PROCESS = 50_000


def encode_shards(
    prepared: Path,
    rank: int,
    world_size: int,
    encode: Encode | None,
    encode_text: EncodeText | None = None,
    vae_batch_size: int = 4,
    decode_threads: int = 2,
    part: tuple[int, int] = (1, 1),
) -> int:
    """Write shards until all that are planned exist; returns how many this worker wrote.

    Workers claim shards by a lock that the kernel drops when they die, so another one takes over. None waits for
    another but at the end, for the shards that others still write.

    Args:
        vae_batch_size: images of the square bucket that are encoded at once; more of small ones.
        decode_threads: that decode and resize images while others are encoded.
        part: (k, n): only the k-th of n parts of the shards, k from 1.
        encode: may be None where no image is to be encoded (see `pending_payloads`).
        encode_text: must be given exactly when the set was planned with cached text.
    """
    settings = stored_settings(prepared)
    if settings["data.cache_text"] != (encode_text is not None) and pending_payloads(prepared) - {"copy"}:
        raise ValueError("encode_text does not agree with data.cache_text")
    with (
        catalog.open_catalog(prepared, read_only=True) as connection,
        pillow_rules(),
        ThreadPoolExecutor(decode_threads, "decode") as pool,
    ):
        # What only refers goes by key, as the catalogue does: by bucket, each of its pages would be read many times.
        shards = sorted(
            pending_shards(connection), key=lambda shard: shard.name if _is_encoded(shard) else shard.first_key
        )
        shards = shards[part[0] - 1 :: part[1]]
        for shard_folder in {(prepared / shard.name).parent for shard in shards}:
            shard_folder.mkdir(parents=True, exist_ok=True)
        # Each worker begins at another place, so that they rarely try for the same shard.
        start = len(shards) * rank // world_size
        remaining = shards[start:] + shards[:start]
        written = 0
        while True:
            held_by_others = []
            for shard in remaining:
                path = prepared / shard.name
                if path.exists():
                    continue
                with _claim(path) as fd:
                    if fd is None:
                        held_by_others.append(shard)
                    elif not path.exists():
                        rows = rows_of_shard(connection, shard)
                        batch_size = vae_batch_size * _batches_of_area(shard, settings)
                        encoder = _Encoder(encode, batch_size, batch_size + 2 * decode_threads, pool)
                        copied = CopiedRows(prepared, connection, shard) if shard.payload == "copy" else None
                        text = encode_text if holds_text(shard) else None
                        _write(fd, path, shard, settings, rows, encoder, text, copied)
                        written += 1
            remaining = held_by_others
            if not remaining:
                return written
            time.sleep(_POLL_SECONDS)


def write_references(prepared: Path, processes: int) -> None:
    """Write the pending shards where all of them only say where payloads lie: in this process if there are few rows."""
    with catalog.open_catalog(prepared, read_only=True) as connection:
        rows = sum(shard.rows for shard in pending_shards(connection))
    if processes < 2 or rows < _ROWS_WORTH_A_PROCESS:
        encode_shards(prepared, 0, 1, encode=None)
        return
    with ProcessPoolExecutor(processes, fork_server(), take_signals) as pool:
        try:
            for done in [pool.submit(encode_shards, prepared, rank, processes, None) for rank in range(processes)]:
                done.result()
        except BrokenProcessPool as error:
            raise UserError("prepare: a process that writes has died; run the same command again to go on") from error


def holds_text(shard: PlannedShard) -> bool:
    """Whether cached text is stored in it: once for each image, with its latents of the main resolution."""
    return not shard.resolution


def _is_encoded(shard: PlannedShard) -> bool:
    return shard.payload == "encode"


def pending_payloads(prepared: Path) -> set[Payload]:
    """What the shards hold that are still to be written."""
    with catalog.open_catalog(prepared, read_only=True) as connection:
        return {shard.payload for shard in pending_shards(connection) if not (prepared / shard.name).exists()}


def _batches_of_area(shard: PlannedShard, settings: dict[str, Any]) -> int:
    """How many times the batch of the square bucket takes no more memory."""
    area = settings["data.buckets.resolution"] ** 2
    return max(1, area // (shard.bucket.height_px * shard.bucket.width_px))


@dataclass(frozen=True)
class _Encoder:
    encode: Encode | None
    batch_size: int
    ahead: int
    """Images that are decoded or being decoded, at most."""
    pool: ThreadPoolExecutor


@contextmanager
def _claim(path: Path) -> Iterator[int | None]:
    """A locked descriptor of the shard's temporary file, or None where another worker holds it."""
    partial = temporary(path)
    fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        if path.exists():
            # Another worker finished between our look and our claim; the file that we made is of no use.
            partial.unlink(missing_ok=True)
        yield fd
    finally:
        os.close(fd)


def _write(
    fd: int,
    path: Path,
    shard: PlannedShard,
    settings: dict[str, Any],
    rows: list[CatalogRow],
    encoder: _Encoder,
    encode_text: EncodeText | None,
    copied: CopiedRows | None,
) -> None:
    """Encode one shard into its claimed temporary file and rename it into place."""
    refers = shard.payload in ("npz", "image")
    head = ShardHead(
        bucket=shard.bucket,
        split=shard.split,
        generation=shard.generation,
        scaling_factor=settings["the VAE's scaling_factor"],
        vae_fingerprint=settings["the VAE (weights and model.vae_precision)"]
        if shard.payload in ("encode", "copy")
        else AS_GIVEN,
        payload="npz" if shard.payload == "npz" else "image" if shard.payload == "image" else "latents",
        has_masks=any(row.mask for row in rows) if copied is None else copied.has_masks,
    )
    excluded: list[dict[str, Any]] = []
    os.ftruncate(fd, 0)
    with os.fdopen(fd, "wb", closefd=False) as file:
        if refers:
            batches = _referring(packed(rows, path, excluded) if shard.payload == "image" else rows)
        elif copied is not None:
            batches, encode_text = copied.batches(rows, head), copied.encode_text
        elif shard.payload == "repack":
            batches = _converted(rows, head, encoder, excluded)
        else:
            batches = _encoded(rows, head, encoder, excluded)
        write_shard(file, head, batches, excluded, encode_text)
        os.fsync(fd)
    temporary(path).rename(path)
    sync_folder(path.parent)


def _referring(rows: list[CatalogRow]) -> Iterator[RowBatch]:
    """All rows at once, with the places of their payloads."""
    references = [
        Reference(row.path, row.offset, row.length, (0, 0) if row.payload == "npz" else row.placement.resized_hw)
        for row in rows
    ]
    yield RowBatch(
        latents=None,
        captions=[row.caption for row in rows],
        keys=[row.key_in_shard for row in rows],
        sizes=np.array([_sizes(row) for row in rows], dtype=np.uint32).reshape(-1, 6),
        repeats=np.array([row.repeats for row in rows], dtype=np.uint32),
        references=references,
        mask_places=[row.mask for row in rows],
    )


def _converted(
    rows: list[CatalogRow], head: ShardHead, encoder: _Encoder, excluded: list[dict[str, Any]]
) -> Iterator[RowBatch]:
    """Batches of latents read from where they lie, in the order of `rows`; threads read ahead."""
    files = ReferencedFiles()

    def load(row: CatalogRow) -> tuple[np.ndarray, np.ndarray | None, np.ndarray] | str:
        latents = np.empty(head.latent_shape, dtype=np.float16)
        mask = np.full(head.latent_shape[1:], FULL, dtype=np.uint8) if head.has_masks else None
        try:
            data = files.read(Reference(row.path, row.offset, row.length, (0, 0)))
            return latents, mask, read_npz(data, np.array(_sizes(row)), latents, mask=mask if row.mask else None)
        except Refused as error:
            return error.reason_for(row.path)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        except (BadNpz, BadMask, EOFError) as error:
            return str(error)

    for first in range(0, len(rows), _CONVERTED_AT_ONCE):
        some = rows[first : first + _CONVERTED_AT_ONCE]
        loaded = list(encoder.pool.map(load, some))
        excluded += [excluded_row(row, why) for row, why in zip(some, loaded, strict=True) if isinstance(why, str)]
        good = [(row, *read) for row, read in zip(some, loaded, strict=True) if not isinstance(read, str)]
        if good:
            yield RowBatch(
                latents=np.stack([latents for _, latents, _, _ in good]),
                captions=[row.caption for row, *_ in good],
                keys=[row.key_in_shard for row, *_ in good],
                sizes=np.array([sizes for *_, sizes in good], dtype=np.uint32),
                repeats=np.array([row.repeats for row, *_ in good], dtype=np.uint32),
                masks=_stacked([mask for _, _, mask, _ in good]),
            )


def _encoded(
    rows: list[CatalogRow], head: ShardHead, encoder: _Encoder, excluded: list[dict[str, Any]]
) -> Iterator[RowBatch]:
    """Batches of encoded rows in the order of `rows`; images that cannot be used go to `excluded`."""
    if encoder.encode is None:
        raise ValueError("images are to be encoded, but there is no encoder")
    for batch in decoded(rows, encoder.pool, encoder.ahead, encoder.batch_size, head.has_masks, excluded):
        seeds = np.array([draw_seed("vae", image.row.key_in_shard) for image in batch], dtype=np.int64)
        latents = np.asarray(encoder.encode(np.stack([image.pixels for image in batch]), seeds))
        if latents.shape != (len(batch), *head.latent_shape):
            raise ValueError(f"the VAE gave latents of shape {latents.shape} for bucket {head.bucket}")
        with np.errstate(invalid="ignore"):
            fits = np.abs(latents).reshape(len(batch), -1).max(axis=1) <= np.finfo(np.float16).max
        reason = "the VAE gives values for it that are not finite or beyond fp16 (model.vae_precision: fp32 may help)"
        excluded += [
            excluded_row(image.row, reason) for image, fit in zip(batch, fits.tolist(), strict=True) if not fit
        ]
        good = [image for image, fit in zip(batch, fits.tolist(), strict=True) if fit]
        yield RowBatch(
            latents=latents[fits].astype(np.float16),
            captions=[image.row.caption for image in good],
            keys=[image.row.key_in_shard for image in good],
            sizes=np.array([_sizes(image.row) for image in good], dtype=np.uint32).reshape(-1, 6),
            repeats=np.array([image.row.repeats for image in good], dtype=np.uint32),
            masks=_stacked([image.mask for image in good]),
        )


def _stacked(masks: list[np.ndarray | None]) -> np.ndarray | None:
    """u8 [b, h, w]; None where the shard has no masks."""
    known = [mask for mask in masks if mask is not None]
    return np.stack(known) if known else None


def _sizes(row: CatalogRow) -> tuple[int, ...]:
    bucket = row.placement.bucket
    return (*row.original_hw, *row.placement.crop_top_left, bucket.height_px, bucket.width_px)

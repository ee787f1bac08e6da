"""One shard: a safetensors file of up to a few thousand samples of one bucket, each row with its checksum.

Sections, in the order of the file (n rows, latents of h x w):

    latents         f16 [n, 4, h, w]   unscaled, at byte 4096
    text_hidden     f16 [n, positions, D]     only with cached text and at the main resolution,
                                       as is text_pooled f16 [n, P]
    caption_offsets u64 [n + 1]        into caption_bytes: UTF-8 JSON objects {"caption": ...}
    key_offsets     u64 [n + 1]        into key_bytes: UTF-8
    sizes           u32 [n, 6]         original h, w, crop top, left, target h, w: the order of SDXL's time ids
    repeats         u32 [n]            times a row is seen per epoch
    latent_crc32c   u32 [n]            of the row's latents
    meta_crc32c     u32 [n]            of the row's caption, key, sizes and repeats
    text_crc32c     u32 [n]            of the row's text_hidden and text_pooled; only with cached text
    masks           u8 [n, h, w]       only where an image has one: 255 is trained in full, 0 not at all
    mask_crc32c     u32 [n]            of the row's mask; only with masks
    key_bytes, caption_bytes, excluded_bytes   u8; the last holds JSON lines on images that were left out

A shard of references has no latents and none of their checksums, but instead, with files F counted by the shard:

    references      u32 [n, 6]         where the row's payload lies: see `references.py`
    mask_references u32 [n, 4]         the same of its mask; only where an image has one
    file_offsets    u64 [F + 1]        into file_bytes: UTF-8 paths relative to the header's `root`

and meta_crc32c covers the row's references and paths as well.

The header is padded to 4096 bytes so that rows can be written as they are encoded, before their number is known.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from crc32c import crc32c

from trainer.data.buckets import Bucket
from trainer.data.sources.source import MaskPlace
from trainer.data.store.mask_counts import MaskCounts, mask_counts
from trainer.data.store.references import FileTable, Reference, file_table
from trainer.errors import UserError, printable
from trainer.guards import Refused, open_regular, parse_json

FORMAT = "sdxl-train shard 1"
HEADER_BYTES = 4096
LATENT_CHANNELS = 4
LATENT_FACTOR = 8
"""Pixels on the side of one latent."""
SECTIONS: tuple[str, ...] = (
    "latents",
    "masks",
    "references",
    "mask_references",
    "text_hidden",
    "text_pooled",
    "caption_offsets",
    "key_offsets",
    "file_offsets",
    "sizes",
    "repeats",
    "latent_crc32c",
    "mask_crc32c",
    "meta_crc32c",
    "text_crc32c",
    "file_bytes",
    "key_bytes",
    "caption_bytes",
    "excluded_bytes",
)
_MOST_EXCLUDED_BYTES = 64 << 20
_EXCLUDED = {"path": str, "key": str, "reason": str, "file_bytes": int, "mtime_ns": int}
_NOT_AS_WRITTEN = (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError)
_DTYPES = {np.dtype("<f2"): "F16", np.dtype("<u8"): "U64", np.dtype("<u4"): "U32", np.dtype("u1"): "U8"}

EncodeText = Callable[[Sequence[str]], tuple[Any, Any]]
"""Captions as JSON texts -> (hidden [B, positions, D], pooled [B, P]), as arrays or CPU tensors."""


class ShardError(Exception):
    """A shard, or a row of it, is not what was written."""


class NotFiniteError(ValueError):
    """A value that fp16 cannot hold."""


@dataclass(frozen=True)
class ShardHead:
    """What all rows of a shard share."""

    bucket: Bucket
    split: str
    generation: int
    scaling_factor: float
    vae_fingerprint: str
    payload: Literal["latents", "npz", "image"] = "latents"
    """What a row holds: latents, or where an `.npz` with latents or an image lies."""
    has_masks: bool = False
    """Whether an image of the shard has a mask; then each row holds one, or where it lies."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (LATENT_CHANNELS, self.bucket.height_px // LATENT_FACTOR, self.bucket.width_px // LATENT_FACTOR)


@dataclass(frozen=True)
class RowBatch:
    """Some rows to be written: latents f16 [b, 4, h, w] or references, captions as JSON texts, sizes u32 [b, 6],
    repeats u32 [b]; with masks, u8 [b, h, w] beside latents and mask_places beside references."""

    latents: np.ndarray | None
    captions: Sequence[str]
    keys: Sequence[str]
    sizes: np.ndarray
    repeats: np.ndarray
    references: Sequence[Reference] = ()
    masks: np.ndarray | None = None
    mask_places: Sequence[MaskPlace | None] = ()


@dataclass(frozen=True)
class ShardInfo:
    """A finished shard as its header tells it."""

    rows: int
    virtual_rows: int
    uniform_repeats: int
    """The repeats of every row, or 0 where they differ."""
    file_bytes: int
    header_crc32c: int
    offsets: dict[str, int]
    """Byte at which each section of `SECTIONS` starts; -1 where the shard has none."""
    text_shape: tuple[int, int, int] | None
    """Positions and width of text_hidden, width of text_pooled."""
    excluded: tuple[dict[str, Any], ...]
    masks: MaskCounts | None = None
    """None where no masks are stored; not kept in snapshots."""


@dataclass
class _Rows:
    """What stays in memory of the rows of the shard being written: all but latents and hidden states."""

    captions: list[bytes] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    sizes: list[np.ndarray] = field(default_factory=list)
    repeats: list[int] = field(default_factory=list)
    references: list[Reference] = field(default_factory=list)
    latent_crc: list[int] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    mask_places: list[MaskPlace | None] = field(default_factory=list)


def write_shard(
    file: BinaryIO,
    head: ShardHead,
    batches: Iterable[RowBatch],
    excluded: Sequence[dict[str, Any]],
    encode_text: EncodeText | None = None,
    text_batch_size: int = 16,
) -> None:
    """Write a whole shard to an open, empty, seekable file; the caller renames it into place after its fsync.

    Args:
        batches: consumed as a stream; latents are written as they come.
        excluded: images that were left out, each a JSON object; read after `batches` has ended.
        encode_text: caches the text encoders' outputs of each caption in the shard.
    """
    rows = _Rows()
    file.seek(HEADER_BYTES)
    for batch in batches:
        if batch.latents is not None:
            _write_latents(file, head, batch.latents, rows)
        _keep(batch, rows)
    n = len(rows.keys)
    sections: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    table = file_table(rows.references, rows.mask_places) if head.payload != "latents" else None
    masks = None
    if table is None:
        sections["latents"] = (np.dtype("<f2"), (n, *head.latent_shape))
        if head.has_masks:
            masks = np.array(rows.masks, dtype="u1").reshape(n, *head.latent_shape[1:])
            _write_section(file, sections, "masks", masks)
    else:
        _write_section(file, sections, "references", table.columns)
        if table.mask_columns is not None:
            _write_section(file, sections, "mask_references", table.mask_columns)
        _write_section(file, sections, "file_offsets", _offsets(table.files))
    text_crc = None
    if encode_text is not None and n:
        pooled, text_crc, hidden_shape = _write_hidden(file, rows, encode_text, text_batch_size)
        sections["text_hidden"] = (np.dtype("<f2"), hidden_shape)
        _write_section(file, sections, "text_pooled", pooled)
    sizes = np.array(rows.sizes, dtype="<u4").reshape(n, 6)
    repeats = np.array(rows.repeats, dtype="<u4")
    _write_section(file, sections, "caption_offsets", _offsets(rows.captions))
    _write_section(file, sections, "key_offsets", _offsets(rows.keys))
    _write_section(file, sections, "sizes", sizes)
    _write_section(file, sections, "repeats", repeats)
    if table is None:
        _write_section(file, sections, "latent_crc32c", np.array(rows.latent_crc, dtype="<u4"))
    if masks is not None:
        _write_section(file, sections, "mask_crc32c", np.array([crc32c(mask.data) for mask in masks], dtype="<u4"))
    _write_section(file, sections, "meta_crc32c", _meta_crc(rows, sizes, repeats, table))
    if text_crc is not None:
        _write_section(file, sections, "text_crc32c", text_crc)
    lines = "".join(json.dumps(line, ensure_ascii=False, sort_keys=True) + "\n" for line in excluded).encode()
    blobs = [("key_bytes", rows.keys), ("caption_bytes", rows.captions), ("excluded_bytes", [lines])]
    for name, blob in blobs if table is None else [("file_bytes", table.files), *blobs]:
        _write_section(file, sections, name, np.frombuffer(b"".join(blob), dtype="u1"))
    file.seek(0)
    file.write(_header(head, sections, crc32c(lines), table.root if table else "", masks))
    file.flush()


def _write_latents(file: BinaryIO, head: ShardHead, latents: np.ndarray, rows: _Rows) -> None:
    latents = np.ascontiguousarray(latents, dtype="<f2")
    if latents.shape[1:] != head.latent_shape:
        raise ValueError(f"latents of shape {latents.shape} do not fit bucket {head.bucket}")
    file.write(latents.data)
    rows.latent_crc.extend(crc32c(row.data) for row in latents)


def _keep(batch: RowBatch, rows: _Rows) -> None:
    payloads = batch.references if batch.latents is None else batch.latents
    if len(payloads) != len(batch.keys):
        raise ValueError(f"{len(payloads)} latents or references for {len(batch.keys)} rows")
    rows.captions.extend(caption.encode() for caption in batch.captions)
    rows.keys.extend(key.encode() for key in batch.keys)
    rows.sizes.extend(batch.sizes)
    rows.repeats.extend(batch.repeats.tolist())
    rows.references.extend(batch.references)
    rows.masks.extend(() if batch.masks is None else batch.masks)
    rows.mask_places.extend(batch.mask_places)


def _meta_crc(rows: _Rows, sizes: np.ndarray, repeats: np.ndarray, table: FileTable | None) -> np.ndarray:
    # Rows of bytes: slicing them is quicker than slicing arrays.
    size_bytes, repeat_bytes = sizes.tobytes(), repeats.tobytes()
    crcs = []
    for i, (caption, key) in enumerate(zip(rows.captions, rows.keys, strict=True)):
        parts = caption, key, size_bytes[24 * i : 24 * i + 24], repeat_bytes[4 * i : 4 * i + 4]
        crcs.append(crc32c(b"".join(parts if table is None else (*parts, *table.checked_parts(i)))))
    return np.array(crcs, dtype="<u4")


def _write_hidden(
    file: BinaryIO, rows: _Rows, encode_text: EncodeText, batch_size: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Writes text_hidden as a stream; returns text_pooled, text_crc32c and the shape of text_hidden."""
    crcs: list[int] = []
    pooled_batches: list[np.ndarray] = []
    shape: tuple[int, ...] = ()
    for start in range(0, len(rows.captions), batch_size):
        captions = [caption.decode() for caption in rows.captions[start : start + batch_size]]
        try:
            hidden, pooled = (finite_f16(np.asarray(output)) for output in encode_text(captions))
        except NotFiniteError as error:
            raise UserError(
                f"data.cache_text: the text encoders give {error} for one of {captions}; "
                "set model.text_encoder_precision: fp32, or cache_text: false"
            ) from error
        file.write(hidden.data)
        crcs.extend(chained_crc(hidden[i], pooled[i]) for i in range(len(captions)))
        pooled_batches.append(pooled)
        shape = hidden.shape[1:]
    return np.concatenate(pooled_batches), np.array(crcs, dtype="<u4"), (len(rows.captions), *shape)


def finite_f16(values: np.ndarray) -> np.ndarray:
    """`values` as contiguous f16; NotFiniteError where one is not finite or is beyond what f16 holds."""
    limit = float(np.finfo(np.float16).max)
    if not np.all(np.abs(values) <= limit):
        raise NotFiniteError(f"values that are not finite, or beyond the {limit:g} of fp16")
    return np.ascontiguousarray(values, dtype="<f2")


def _write_section(
    file: BinaryIO, sections: dict[str, tuple[np.dtype, tuple[int, ...]]], name: str, values: np.ndarray
) -> None:
    file.write(values.tobytes())
    sections[name] = (values.dtype, values.shape)


def _offsets(blobs: Sequence[bytes]) -> np.ndarray:
    return np.cumsum([0, *map(len, blobs)], dtype=np.uint64).astype("<u8")


def chained_crc(*parts: bytes | np.ndarray) -> int:
    """crc32c of the parts, one after the other."""
    crc = 0
    for part in parts:
        crc = crc32c(part.data if isinstance(part, np.ndarray) else part, crc)
    return crc


def _header(
    head: ShardHead,
    sections: dict[str, tuple[np.dtype, tuple[int, ...]]],
    excluded_crc: int,
    root: str,
    masks: np.ndarray | None,
) -> bytes:
    described: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "bucket": f"{head.bucket.height_px}x{head.bucket.width_px}",
            "split": head.split,
            "generation": str(head.generation),
            "scaling_factor": repr(head.scaling_factor),
            "vae": head.vae_fingerprint,
            "excluded_crc32c": str(excluded_crc),
            **({} if head.payload == "latents" else {"payload": head.payload, "root": root}),
            **({} if masks is None else {"masks": json.dumps(mask_counts(masks))}),
        }
    }
    end = 0
    for name, (dtype, shape) in sections.items():
        begin, end = end, end + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        described[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    room = HEADER_BYTES - 8
    if len(text) > room:
        raise ValueError(f"the shard's header takes {len(text)} bytes, more than {room}")
    return room.to_bytes(8, "little") + text.ljust(room)


def count_masks(shards: Sequence[ShardInfo]) -> MaskCounts | None:
    """Of all their images together, those of a shard without masks being trained in full; None where none has any."""
    images, counts = sum(shard.rows for shard in shards), [shard.masks for shard in shards if shard.masks]
    if not counts or not images:
        return None
    left_out = sum(count.images * (1 - count.trained) for count in counts)
    return MaskCounts(images, sum(count.masked for count in counts), 1 - left_out / images)


def read_info(path: Path) -> ShardInfo:
    """Read a finished shard's header and small sections; ShardError where they are not as written."""
    try:
        with open_regular(path) as file:
            return _info(path, file)
    except Refused as error:
        raise ShardError(str(error)) from error
    except _NOT_AS_WRITTEN as error:
        raise ShardError(f"{path}: the header cannot be read ({printable(str(error))})") from error


def _info(path: Path, file: BinaryIO) -> ShardInfo:
    raw = file.read(HEADER_BYTES)
    file_bytes = os.fstat(file.fileno()).st_size
    header = parse_json(raw[8:], str(path), most_bytes=HEADER_BYTES)
    metadata = header.pop("__metadata__")
    if metadata["format"] != FORMAT:
        found = printable(str(metadata["format"]), 60)
        raise ShardError(f"{path}: made in the format '{found}', this version reads '{FORMAT}'")
    if HEADER_BYTES + max(entry["data_offsets"][1] for entry in header.values()) != file_bytes:
        raise ShardError(f"{path}: has {file_bytes} bytes, its header tells another number")
    offsets = {name: HEADER_BYTES + header[name]["data_offsets"][0] if name in header else -1 for name in SECTIONS}
    if not all(type(at) is int and -1 <= at <= file_bytes for at in offsets.values()) or offsets["excluded_bytes"] < 0:
        raise ShardError(f"{path}: its header tells of sections that the file has not")
    rows = header["repeats"]["shape"][0]
    if type(rows) is not int or not 0 <= rows <= file_bytes // 4:
        raise ShardError(f"{path}: has {file_bytes} bytes, its header tells of {printable(str(rows), 40)} rows")
    file.seek(offsets["repeats"])
    repeats = np.frombuffer(file.read(4 * rows), dtype="<u4")
    file.seek(offsets["excluded_bytes"])
    lines = file.read(_MOST_EXCLUDED_BYTES)
    if crc32c(lines) != int(metadata["excluded_crc32c"]):
        raise ShardError(f"{path}: checksum mismatch in excluded_bytes")
    text_shape = None
    if "text_hidden" in header:
        positions, width = header["text_hidden"]["shape"][1:]
        text_shape = positions, width, header["text_pooled"]["shape"][1]
    return ShardInfo(
        rows=rows,
        virtual_rows=int(repeats.sum(dtype=np.int64)),
        uniform_repeats=int(repeats[0]) if rows and (repeats == repeats[0]).all() else 0,
        file_bytes=file_bytes,
        header_crc32c=crc32c(raw),
        offsets=offsets,
        text_shape=text_shape,
        excluded=tuple(_excluded(line) for line in lines.splitlines()),
        masks=MaskCounts(*json.loads(metadata["masks"])) if "masks" in metadata else None,
    )


def _excluded(line: bytes) -> dict[str, Any]:
    """A line on an image that was left out; raises one of `_NOT_AS_WRITTEN`."""
    fields = json.loads(line)
    for name, value in fields.items():
        is_right = abs(value) < 1 << 63 if type(value) is int else isinstance(value, str)
        if name not in _EXCLUDED or type(value) is not _EXCLUDED[name] or not is_right:
            raise ValueError("excluded_bytes holds other lines")
    return fields

"""Random reads of one shard's rows: their meta data, and their payload wherever it lies."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from crc32c import crc32c

from trainer.data.augment import View, view_sizes
from trainer.data.buckets import Bucket, Placement
from trainer.data.captions import is_record
from trainer.data.images import BadImage, load_mask, load_view
from trainer.data.masks import FULL, BadMask
from trainer.data.sources.source import OWN_MASK, WHOLE, MaskPlace
from trainer.data.store.edits import OpenEdit
from trainer.data.store.moves import moved
from trainer.data.store.npz import BadNpz, read_latents
from trainer.data.store.references import (
    MASK_REFERENCE_BYTES,
    REFERENCE_BYTES,
    Reference,
    ReferencedFiles,
    mask_file_number,
    mask_place_of,
    reference_of,
)
from trainer.data.store.shards import HEADER_BYTES, ShardError, chained_crc
from trainer.guards import Refused

_NUMBERS = ("loss_weight", "score")  # of a caption record
_MOST_CAPTION_BYTES = 16 << 20

ChoosePlace = Callable[[str, Placement], View]
"""(key, placement at the centre) -> the view of an image that this read is to give.

Of latents in an `.npz`, only whether it is mirrored counts."""


class PayloadError(Exception):
    """The file that a row refers to does not give what the row needs; the shard itself is as it was written."""

    def __init__(self, reference: Reference, reason: str) -> None:
        super().__init__(reason)
        self.reference = reference


@dataclass(frozen=True)
class RowRecord:
    """A row's meta data: caption is a JSON text, sizes integers [6]; where its payload lies, if that is elsewhere.

    Until the payload has been read, sizes are those that were known when the row was prepared.
    """

    caption: str
    key: str
    sizes: np.ndarray
    reference: Reference | None = None
    mask: MaskPlace | None = None
    """Where the mask of a payload that lies elsewhere is, if the image has one."""


class OpenShard:
    """A shard opened for random reads; the descriptor is closed when the last holder lets go of it."""

    __slots__ = (
        "caption_bytes",
        "edit",
        "fd",
        "file_bytes",
        "files",
        "key_bytes",
        "offsets",
        "payload",
        "repeat_ends",
        "root",
        "rows",
    )

    def __init__(
        self,
        path: str | Path,
        rows: int,
        offsets: dict[str, int],
        file_bytes: int,
        header_crc: int,
        files: ReferencedFiles | None = None,
        edit: OpenEdit | None = None,
    ):
        """Raises OSError, or ShardError where the file's size or header is not as recorded.

        Args:
            files: through which the files are read that rows refer to; default: of this shard alone.
            edit: what has changed of its rows since it was written.
        """
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.rows, self.offsets, self.edit = rows, offsets, edit
        self.key_bytes = offsets["caption_bytes"] - offsets["key_bytes"]
        self.caption_bytes = offsets["excluded_bytes"] - offsets["caption_bytes"]
        self.file_bytes = offsets["key_bytes"] - offsets["file_bytes"]
        self.repeat_ends: np.ndarray | None = None
        size = os.fstat(self.fd).st_size
        if size != file_bytes:
            raise ShardError(f"has {size} bytes in place of {file_bytes}")
        header = os.pread(self.fd, HEADER_BYTES, 0)
        if crc32c(header) != header_crc:
            raise ShardError("checksum mismatch in the header")
        self.payload, self.root = "latents", ""
        self.files = files or ReferencedFiles()
        if offsets["references"] >= 0:
            try:
                metadata = json.loads(header[8:])["__metadata__"]
                self.payload, self.root = str(metadata["payload"]), str(metadata["root"])
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ShardError("its header does not tell what its rows refer to") from error
        # Rows are read in random order: reading ahead would only evict others from the page cache.
        os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def ends_of_repeats(self, virtual_rows: int) -> np.ndarray:
        """Cumulative repeats of the rows that count, int64 [n]; ShardError where they do not add up to
        `virtual_rows`."""
        if self.repeat_ends is None:
            repeats = self.repeats()
            ends = np.cumsum(repeats, dtype=np.int64)
            if not len(ends) or ends[-1] != virtual_rows:
                raise ShardError("the repeats are not as recorded")
            self.repeat_ends = ends
        return self.repeat_ends

    def repeats(self) -> np.ndarray:
        """How often each row that counts is seen per epoch, u32 [n]."""
        if self.edit is not None:
            return self.edit.repeats
        raw = os.pread(self.fd, 4 * self.rows, self.offsets["repeats"])
        repeats = np.frombuffer(raw, dtype="<u4")
        if len(repeats) != self.rows:
            raise ShardError("the file ends before its repeats do")
        return repeats


def read_row(
    shard: OpenShard,
    row: int,
    payload: np.ndarray,
    text: tuple[np.ndarray, np.ndarray] | None,
    choose_place: ChoosePlace | None = None,
    mask: np.ndarray | None = None,
) -> RowRecord:
    """Read one row, its latents (f16 [4, h, w]) or pixels (u8 [3, 8h, 8w]) into `payload`, and its text outputs.

    Args:
        payload: contiguous; latents are read straight into it.
        text: hidden and pooled outputs of the text encoders to fill, where the shard holds them.
        choose_place: of an image; default: the centre, as it lies in the file.
        mask: u8 [h, w], contiguous, to be filled where masks are wanted; 255 for an image without one.

    Raises:
        ShardError: a checksum does not match; the buffers then hold what was read.
        PayloadError: what the row refers to cannot be used.
        OSError: the shard cannot be read.
    """
    record = read_record(shard, row)
    sizes = read_payload(shard, row, record, payload, choose_place, mask)
    if text is not None:
        _read_text(shard, row, text)
    return record if sizes is record.sizes else replace(record, sizes=sizes)


def _read_text(shard: OpenShard, row: int, text: tuple[np.ndarray, np.ndarray]) -> None:
    hidden, pooled = text
    _read_into(shard.fd, hidden, shard.offsets["text_hidden"] + row * hidden.nbytes)
    _read_into(shard.fd, pooled, shard.offsets["text_pooled"] + row * pooled.nbytes)
    if chained_crc(hidden, pooled) != _u32(shard, "text_crc32c", row):
        raise ShardError("checksum mismatch in the text encoders' outputs")


def read_text_elsewhere(
    shard: OpenShard, row: int, text: tuple[np.ndarray, np.ndarray], other: OpenShard, other_row: int
) -> None:
    """Read a row's text for the row of another shard, which has to be of the same image; raises as `read_row` does."""
    if _blob(shard, "key", row, shard.key_bytes) != _blob(other, "key", other_row, other.key_bytes):
        raise ShardError("its row is not of the image whose text it holds")
    _read_text(shard, row, text)


def read_record(shard: OpenShard, row: int) -> RowRecord:
    """A row's meta data alone; raises as `read_row` does."""
    caption = _blob(shard, "caption", row, shard.caption_bytes)
    key = _blob(shard, "key", row, shard.key_bytes)
    sizes = os.pread(shard.fd, 24, shard.offsets["sizes"] + 24 * row)
    repeats = os.pread(shard.fd, 4, shard.offsets["repeats"] + 4 * row)
    parts, reference = (caption, key, sizes, repeats), None
    if shard.payload != "latents":
        line = os.pread(shard.fd, REFERENCE_BYTES, shard.offsets["references"] + REFERENCE_BYTES * row)
        path = _blob(shard, "file", int.from_bytes(line[:4], "little"), shard.file_bytes)
        parts = (*parts, line, path)
        reference = line, path
    mask = None
    if shard.offsets["mask_references"] >= 0:
        line = os.pread(shard.fd, MASK_REFERENCE_BYTES, shard.offsets["mask_references"] + MASK_REFERENCE_BYTES * row)
        number = mask_file_number(line)
        path = b"" if number is None else _blob(shard, "file", number, shard.file_bytes)
        parts = (*parts, line, path)
        mask = line, path
    if crc32c(b"".join(parts)) != _u32(shard, "meta_crc32c", row):
        raise ShardError("checksum mismatch in the caption, key or sizes")
    if shard.edit is not None and (changed := shard.edit.text_of(row)) is not None:
        key, caption = changed
    _check_caption(caption)
    try:
        return RowRecord(
            caption.decode(),
            key.decode(),
            np.frombuffer(sizes, dtype="<u4"),
            reference_of(reference[0], _path(shard, reference[1])) if reference else None,
            mask_place_of(mask[0], _path(shard, mask[1])) if mask else None,
        )
    except UnicodeDecodeError as error:
        raise ShardError("a key or a path is no Unicode text") from error


def _path(shard: OpenShard, relative: bytes) -> str:
    return moved(shard.root + relative.decode(), shard.files.moves)


def _check_caption(caption: bytes) -> None:
    """A checksum tells damage, but not what somebody else has written; captions are composed with no further check."""
    try:
        fields = json.loads(caption) if len(caption) <= _MOST_CAPTION_BYTES else None
    except (ValueError, RecursionError):
        fields = None
    if not is_record(fields):
        raise ShardError("the caption is no record of a caption")


def read_captions(shard: OpenShard) -> tuple[list[bytes], list[int]]:
    """The caption records of all rows that count and how often each is seen, in few reads and without the checksums.

    Raises as `read_row` does.
    """
    raw = os.pread(shard.fd, 8 * (shard.rows + 1), shard.offsets["caption_offsets"])
    ends = np.frombuffer(raw, dtype="<u8").tolist()
    blob = os.pread(shard.fd, shard.caption_bytes, shard.offsets["caption_bytes"])
    repeats = shard.repeats().tolist()
    if len(ends) != shard.rows + 1 or len(blob) != shard.caption_bytes:
        raise ShardError("the file ends before its captions do")
    captions = [blob[begin:end] for begin, end in pairwise(ends)]
    if shard.edit is not None:
        texts = [(row, shard.edit.text_of(row)) for row in shard.edit.rows.tolist()]
        captions = [captions[row] if changed is None else changed[1] for row, changed in texts]
    return captions, repeats


def read_keys(shard: OpenShard) -> list[str]:
    """The keys of all rows of the file, without the checksums; raises as `read_row` does."""
    raw = os.pread(shard.fd, 8 * (shard.rows + 1), shard.offsets["key_offsets"])
    ends = np.frombuffer(raw, dtype="<u8").tolist()
    blob = os.pread(shard.fd, shard.key_bytes, shard.offsets["key_bytes"])
    if len(ends) != shard.rows + 1 or len(blob) != shard.key_bytes:
        raise ShardError("the file ends before its keys do")
    try:
        return [blob[begin:end].decode() for begin, end in pairwise(ends)]
    except UnicodeDecodeError as error:
        raise ShardError("a key is no Unicode text") from error


def read_payload(
    shard: OpenShard,
    row: int,
    record: RowRecord,
    payload: np.ndarray,
    choose_place: ChoosePlace | None = None,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Fill `payload` with the row's latents or pixels; the one place that knows where they lie, and where masks do.

    Returns:
        The row's sizes: those of the record, but for what the payload tells better.
    """
    reference = record.reference
    if reference is None:
        _read_into(shard.fd, payload, shard.offsets["latents"] + row * payload.nbytes)
        if crc32c(payload.data) != _u32(shard, "latent_crc32c", row):
            raise ShardError("checksum mismatch in the latents")
        if mask is not None:
            _read_mask(shard, row, mask)
        return record.sizes
    if mask is not None and record.mask != OWN_MASK:
        mask[:] = FULL
    own_mask = mask if record.mask == OWN_MASK else None
    try:
        if shard.payload == "npz":
            mirrored = choose_place is not None and choose_place(record.key, _as_stored(record.sizes)).flipped
            return read_npz(shard.files.read(reference), record.sizes, payload, mirrored, own_mask)
        data = Path(reference.file) if reference.length == WHOLE else bytes(shard.files.read(reference))
        original_hw = int(record.sizes[0]), int(record.sizes[1])
        view = _view(record, reference, payload.shape[1:], choose_place)
        load_view(data, original_hw, view, payload, own_mask)
    except (BadNpz, BadImage, BadMask, EOFError) as error:
        raise PayloadError(reference, str(error)) from error
    except Refused as error:
        raise PayloadError(reference, error.reason_for(reference.file)) from error
    except OSError as error:
        raise PayloadError(reference, f"cannot be read: {error.strerror}") from error
    if mask is not None and record.mask is not None and record.mask != OWN_MASK:
        _read_mask_file(shard, record.mask, original_hw, view, mask)
    return np.array(view_sizes(original_hw, view), dtype=np.int64)


def _read_mask(shard: OpenShard, row: int, mask: np.ndarray) -> None:
    """Of stored latents."""
    if shard.offsets["masks"] < 0:
        mask[:] = FULL
        return
    _read_into(shard.fd, mask, shard.offsets["masks"] + row * mask.nbytes)
    if crc32c(mask.data) != _u32(shard, "mask_crc32c", row):
        raise ShardError("checksum mismatch in the mask")


def _read_mask_file(
    shard: OpenShard, place: MaskPlace, original_hw: tuple[int, int], view: View, mask: np.ndarray
) -> None:
    """Of an image that is decoded anew; PayloadError names the mask's file."""
    reference = Reference(*place, (0, 0))
    try:
        data = Path(place.file) if place.length == WHOLE else bytes(shard.files.read(reference))
        load_mask(data, original_hw, view, mask)
    except (BadMask, EOFError) as error:
        raise PayloadError(reference, str(error)) from error
    except Refused as error:
        raise PayloadError(reference, f"its mask {error.reason_for(place.file)}") from error
    except OSError as error:
        raise PayloadError(reference, f"its mask cannot be read: {error.strerror}") from error


def _as_stored(sizes: np.ndarray) -> Placement:
    """Of latents, which cannot be cropped anew."""
    height, width = sizes[4:].tolist()
    return Placement(Bucket(height, width), (height, width), (0, 0))


def read_npz(
    data: bytes | bytearray,
    sizes: np.ndarray,
    latents: np.ndarray,
    mirrored: bool = False,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Fill `latents` and `mask` from an `.npz`; returns the sizes [6], with original size and crop as it tells them."""
    told = read_latents(data, latents, mirrored, mask)
    if told.original_hw is None and told.crop_top_left is None:
        return sizes
    original_h, original_w, top, left, *target_hw = sizes.tolist()
    return np.array(
        [*(told.original_hw or (original_h, original_w)), *(told.crop_top_left or (top, left)), *target_hw],
        dtype=np.int64,
    )


def _view(record: RowRecord, reference: Reference, hw: tuple[int, ...], choose_place: ChoosePlace | None) -> View:
    top, left, height, width = record.sizes[2:].tolist()
    resized_h, resized_w = reference.resized_hw
    if (height, width) != hw or top + height > resized_h or left + width > resized_w or not record.sizes[:2].all():
        raise ShardError(f"sizes {record.sizes.tolist()} that do not fit its bucket, {hw[0]} x {hw[1]}")
    centred = Placement(Bucket(height, width), reference.resized_hw, (top, left))
    return choose_place(record.key, centred) if choose_place else View(centred, False)


def _blob(shard: OpenShard, name: str, row: int, total: int) -> bytes:
    ends = os.pread(shard.fd, 16, shard.offsets[f"{name}_offsets"] + 8 * row)
    begin, end = int.from_bytes(ends[:8], "little"), int.from_bytes(ends[8:], "little")
    if not begin <= end <= total:
        raise ShardError(f"the {name} lies outside its section")
    return os.pread(shard.fd, end - begin, shard.offsets[f"{name}_bytes"] + begin)


def _u32(shard: OpenShard, name: str, row: int) -> int:
    return int.from_bytes(os.pread(shard.fd, 4, shard.offsets[name] + 4 * row), "little")


def _read_into(fd: int, buffer: np.ndarray, offset: int) -> None:
    if os.preadv(fd, [buffer.data.cast("B")], offset) != buffer.nbytes:
        raise ShardError("the file ends before the row does")

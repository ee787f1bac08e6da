"""One listed item: a row of the catalogue, or why it cannot be used; its file is opened where nothing else tells."""

import os
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from trainer.data.buckets import Bucket, Placement, place
from trainer.data.captions import WEIGHT_MARK, caption_record
from trainer.data.images import BadImage, has_alpha, image_hw
from trainer.data.masks import BadMask, check_mask_shape
from trainer.data.prepare.catalog import BadRow, CatalogRow, FileStamp, Payload
from trainer.data.prepare.settings import PrepareSettings
from trainer.data.sources.folder import BadCaption, read_caption
from trainer.data.sources.source import OWN_MASK, ROW, WHOLE, MaskPlace, SourceItem, open_range, read_bytes
from trainer.data.store.npz import HEAD_BYTES, BadNpz, latents_hw, latents_hw_of_head
from trainer.data.store.shards import LATENT_FACTOR
from trainer.errors import printable
from trainer.guards import Limits, Refused
from trainer.keyed import draw_uniform

NEVER = -1
"""File size of a bad row that is to be judged anew each time."""

_MOST_KEY = 4096

Verdict = CatalogRow | BadRow | str
"""A new row, a bad one, or `known`, `changed` or `bad` for what the catalogue has."""


@dataclass(frozen=True)
class Known:
    """What the catalogue holds under a key."""

    place: tuple[str, int]
    stamp: FileStamp


@dataclass(frozen=True)
class Rules:
    """What decides a row, but for the item."""

    settings: PrepareSettings
    buckets: tuple[Bucket, ...]


def problem_of_texts(item: SourceItem, limits: Limits) -> str:
    """Why an item's name or caption cannot be kept, whatever its source; or nothing."""
    try:
        (item.key + item.file).encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8; rename it"
    if len(item.key) > _MOST_KEY:
        return f"its key has {len(item.key):,} characters; at most {_MOST_KEY:,} are kept"
    if item.caption is not None and len(item.caption) > limits.caption_bytes:
        return f"its caption has {len(item.caption):,} characters; at most {limits.caption_bytes:,} are kept"
    return ""


def bad_listed(item: SourceItem, problem: str) -> BadRow:
    """An item with a problem, in text that can be kept."""
    texts = (item.file, item.key[:_MOST_KEY])
    path, key = map(_as_utf8, texts)
    return BadRow(path, key, NEVER, NEVER, printable(problem))


def _as_utf8(text: str) -> str:
    try:
        return text.encode(errors="surrogateescape").decode(errors="backslashreplace")
    except UnicodeEncodeError:  # half a character that no file name has
        return text.encode(errors="backslashreplace").decode()


def judge(rules: Rules, item: SourceItem, known: Known | None, judged: tuple[int, int] | None) -> Verdict:
    """Look at one item.

    Args:
        judged: size and time of its file when it was found to be bad.
    """
    file_bytes, mtime_ns = item.file_bytes, item.mtime_ns
    try:
        if file_bytes < 0:
            stat = os.stat(item.file)  # noqa: PTH116 - no Path object per image
            file_bytes, mtime_ns = stat.st_size, stat.st_mtime_ns
        if item.mask is not None and item.mask.file and item.mask.length == WHOLE:
            mtime_ns ^= _mtime_ns(item.mask.file)  # an image that is bad by its mask is mended by it
        stamp = FileStamp(file_bytes, mtime_ns, _caption_stamp(item))
        if known is not None:
            return "known" if known.place == (item.file, item.offset) and known.stamp == stamp else "changed"
        if judged == (file_bytes, mtime_ns):
            return "bad"
        if file_bytes > rules.settings.limits.image_bytes:
            raise ValueError(f"has {file_bytes:,} bytes; at most {rules.settings.limits.image_bytes:,} are read")
        return _row(rules, item, stamp)
    except BadCaption as error:
        return BadRow(item.file, item.key, NEVER, NEVER, str(error))
    except Refused as error:
        return BadRow(item.file, item.key, file_bytes, mtime_ns, error.reason_for(item.file))
    except OSError as error:
        return BadRow(item.file, item.key, NEVER, NEVER, f"cannot be read: {error.strerror}")
    except (BadImage, BadMask, BadNpz, EOFError, ValueError) as error:
        return BadRow(item.file, item.key, file_bytes, mtime_ns, printable(str(error)))


def _row(rules: Rules, item: SourceItem, stamp: FileStamp) -> CatalogRow:
    settings = rules.settings
    held_out = settings.validation_fraction > 0 and draw_uniform("split", item.key) < settings.validation_fraction
    payload: Payload = "npz"
    mask = item.mask
    if item.kind == "latents":
        if settings.mode == "images":
            raise ValueError("is a file of latents, which data.mode: images does not use")
        if not stamp.file_bytes:
            raise ValueError("is empty")
        placement = _placement_of_latents(item.bucket_hw or _bucket_hw(item, settings.limits))
        original_hw = item.original_hw or _sides(placement.bucket)
    else:
        payload = "image" if settings.mode == "images" else "encode"
        original_hw = item.original_hw if item.length == ROW and item.original_hw else _image_hw(item, settings.limits)
        placement = place(original_hw, rules.buckets, settings.buckets)
        mask = _mask(item, original_hw, settings.limits)
    caption = item.caption or caption_record("").decode()
    return CatalogRow(
        key=item.key,
        path=item.file,
        offset=item.offset,
        length=item.length,
        payload=payload,
        stamp=stamp,
        caption=read_caption(item.caption_path, caption, settings.limits.caption_bytes)
        if item.caption_path
        else caption,
        repeats=1 if held_out else item.repeats,
        split="validation" if held_out else "train",
        original_hw=original_hw,
        placement=placement,
        mask=mask,
    )


def _mask(item: SourceItem, original_hw: tuple[int, int], limits: Limits) -> MaskPlace | None:
    """Where the mask of an image lies, which is there and of its shape; raises BadMask."""
    mask = item.mask
    if mask is None or ROW in (mask.length, item.length):  # that of a table's row was looked at when it was listed
        return mask
    if mask == OWN_MASK:
        with open_range(item.file, item.offset, item.length) as file:
            return mask if has_alpha(file) else None
    try:
        with open_range(*mask) as file:
            check_mask_shape(image_hw(file, limits), original_hw)
    except BadImage as error:
        raise BadMask(f"its mask {error}") from error
    except Refused as error:
        raise BadMask(f"its mask {error.reason_for(mask.file)}") from error
    except OSError as error:
        raise BadMask(f"its mask cannot be read: {error.strerror}") from error
    return mask


def _image_hw(item: SourceItem, limits: Limits) -> tuple[int, int]:
    if item.length == WHOLE:
        return image_hw(Path(item.file), limits)
    with open_range(item.file, item.offset, item.length) as file:
        return image_hw(file, limits)


def _sides(bucket: Bucket) -> tuple[int, int]:
    return bucket.height_px, bucket.width_px


@lru_cache(maxsize=4096)
def _placement_of_latents(bucket_hw: tuple[int, int]) -> Placement:
    """Where the crop lay is told by the `.npz`, when it is read."""
    return Placement(Bucket(*bucket_hw), bucket_hw, (0, 0))


def _bucket_hw(item: SourceItem, limits: Limits) -> tuple[int, int]:
    """From the header of the latents, of which a few hundred bytes are read where they stand first in the archive."""
    size = os.stat(item.file).st_size if item.length == WHOLE else item.length  # noqa: PTH116
    hw = latents_hw_of_head(read_bytes(item.file, item.offset, min(size, HEAD_BYTES)))
    height, width = hw or latents_hw(read_bytes(item.file, item.offset, item.length))
    if height * width * LATENT_FACTOR**2 > limits.image_pixels:
        raise BadNpz(f"latents of {height} x {width}, of an image of more than {limits.image_pixels:,} pixels")
    return height * LATENT_FACTOR, width * LATENT_FACTOR


def _caption_stamp(item: SourceItem) -> int:
    """Differs where the caption does, or the image's own loss weight."""
    caption = item.caption or ""
    if not item.caption_path:
        return zlib.crc32(caption.encode())
    return _mtime_ns(item.caption_path) + (zlib.crc32(caption.encode()) if WEIGHT_MARK in caption else 0)


def _mtime_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116
    except OSError:
        return 0

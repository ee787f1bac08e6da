"""One listed item: a row of the catalogue, what has changed of one, or why it cannot be used.

Its file is opened where nothing else tells."""

import os
import zlib
from functools import lru_cache
from pathlib import Path

from trainer.data.buckets import Bucket, Placement, place
from trainer.data.captions import WEIGHT_MARK, caption_record
from trainer.data.catalog.catalog import BadRow, CatalogRow, FileStamp, Payload
from trainer.data.catalog.changes import Update
from trainer.data.catalog.filtered import LeftOutBefore
from trainer.data.catalog.filters import NEAR_DUPLICATES
from trainer.data.catalog.fingerprint import fingerprint
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.catalog.verdicts import Known, KnownLeftOut, LeftOut, Replaced, Rules, StillLeftOut, Verdict
from trainer.data.images import BadImage, has_alpha, image_hw
from trainer.data.masks import BadMask, check_mask_shape
from trainer.data.sources.sidecars import BadCaption, FoundCaption, Sidecars, read_caption
from trainer.data.sources.source import OWN_MASK, ROW, WHOLE, MaskPlace, SourceItem, open_range, read_bytes
from trainer.data.store.npz import HEAD_BYTES, BadNpz, latents_hw, latents_hw_of_head
from trainer.data.store.shards import LATENT_FACTOR
from trainer.errors import printable
from trainer.guards import Limits, Refused
from trainer.keyed import draw_seed, draw_uniform

NEVER = -1
"""File size of a bad row that is to be judged anew each time."""

LOST = "\ufffd"
"""What stands in a text for what could not be decoded."""

_MOST_KEY = 4096
_PLAIN = '{"caption":'


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


def judge(
    rules: Rules,
    item: SourceItem,
    known: Known | None,
    judged: tuple[int, int] | None,
    left_out: LeftOutBefore | None = None,
) -> Verdict:
    """Look at one item.

    Args:
        known: what the rows of the catalogue hold under its key.
        judged: size and time of its file when it was found to be bad.
        left_out: what was known of it when a filter left it out.
    """
    file_bytes, mtime_ns = item.file_bytes, item.mtime_ns
    try:
        if file_bytes < 0:
            stat = os.stat(item.file)  # noqa: PTH116 - no Path object per image
            file_bytes, mtime_ns = stat.st_size, stat.st_mtime_ns
        if item.mask is not None and item.mask.file and item.mask.length == WHOLE:
            mtime_ns ^= _mtime_ns(item.mask.file)  # an image that is bad by its mask is mended by it
        stamp = FileStamp(file_bytes, mtime_ns, _caption_stamp(item, rules.sidecars_of(item)))
        if known is not None:
            verdict = _compared(rules, item, known, stamp)
            return _filtered(rules, item, known, verdict) if rules.filters.is_on else verdict
        if judged == (file_bytes, mtime_ns):
            return "bad"
        if left_out is not None and (verdict := _still_left_out(rules, item, left_out, stamp)) is not None:
            return verdict
        row = _row(rules, item, stamp)
        return _let_through(rules, row) if rules.filters.is_on else row
    except BadCaption as error:
        return BadRow(item.file, item.key, NEVER, NEVER, str(error))
    except Refused as error:
        return BadRow(item.file, item.key, file_bytes, mtime_ns, error.reason_for(item.file))
    except OSError as error:
        return BadRow(item.file, item.key, NEVER, NEVER, f"cannot be read: {error.strerror}")
    except (BadImage, BadMask, BadNpz, EOFError, ValueError) as error:
        return BadRow(item.file, item.key, file_bytes, mtime_ns, printable(str(error)))


def _let_through(rules: Rules, row: CatalogRow) -> CatalogRow | LeftOut:
    reason = rules.filters.reason(row.key, row.original_hw, row.caption)
    return row if reason is None else LeftOut(row, reason)


def _filtered(rules: Rules, item: SourceItem, known: Known, verdict: Verdict) -> Verdict:
    """The verdict on an image that is a row, or that it is left out."""
    if isinstance(verdict, Replaced):
        return Replaced(_let_through(rules, verdict.by)) if isinstance(verdict.by, CatalogRow) else verdict
    update = verdict if isinstance(verdict, Update) else None
    caption = known.caption if update is None or update.caption is None else update.caption
    reason = rules.filters.reason(item.key, known.original_hw, caption)
    return verdict if reason is None else KnownLeftOut(item.key, reason, update)


def _still_left_out(rules: Rules, item: SourceItem, before: LeftOutBefore, stamp: FileStamp) -> StillLeftOut | None:
    """That it is as it was when it was left out, and still is; its file is not opened. None: it is to be looked at."""
    repeats = 1 if before.split == "validation" else item.repeats
    if (before.place, before.stamp, before.repeats) != ((item.file, item.offset), stamp, repeats):
        return None
    reason = rules.filters.reason(item.key, before.original_hw, before.caption)
    if reason is not None:
        return StillLeftOut(item.key, None if reason == before.reason else reason)
    # Whether it is still one of several is told when all are known.
    is_compared = rules.settings.filters.near_duplicates is not None and before.reason.filter == NEAR_DUPLICATES
    return StillLeftOut(item.key, None) if is_compared else None


def _compared(rules: Rules, item: SourceItem, known: Known, stamp: FileStamp) -> Verdict:
    """What has changed of an image that the catalogue has."""
    same_file = known.stamp[:2] == stamp[:2]
    repeats = 1 if known.split == "validation" else item.repeats
    place = (item.file, item.offset)
    if same_file and not known.is_lossy and (known.place, known.stamp, known.repeats) == (place, stamp, repeats):
        return "known"
    content, payload = known.content, _payload(rules.settings, item)
    if payload != known.payload:
        return _replaced(rules, item, stamp)
    if payload != "encode":  # to read it anew costs nothing that could be saved
        if not same_file or (place != known.place and not rules.is_moved(known.place, place)):
            return _replaced(rules, item, stamp)
    elif not same_file:
        content = fingerprint(item.file, item.offset, item.length, item.mask)
        if content != known.content:
            return _replaced(rules, item, stamp)
    caption = None
    is_other = stamp.caption_stamp != known.stamp.caption_stamp
    if is_other or known.is_lossy:
        caption = _caption(item, rules)
        is_other = is_other or LOST not in caption.record  # decoded better than when it was prepared
        if is_other and rules.settings.text_encoders is not None:  # what they give is stored beside the latents
            return _replaced(rules, item, stamp)
    mask = None if item.mask == OWN_MASK else item.mask
    changes = (item.key, item.file, item.offset, item.length, stamp, repeats, mask, content)
    return Update(*changes, *(caption or (None, None)))


def _replaced(rules: Rules, item: SourceItem, stamp: FileStamp) -> Replaced:
    try:
        return Replaced(_row(rules, item, stamp))
    except (BadImage, BadMask, BadNpz, EOFError, ValueError) as error:
        if isinstance(error, BadCaption):
            raise
        return Replaced(BadRow(item.file, item.key, stamp.file_bytes, stamp.mtime_ns, printable(str(error))))


def _payload(settings: PrepareSettings, item: SourceItem) -> Payload:
    if item.kind == "latents":
        return "npz"
    return "image" if settings.mode == "images" else "encode"


def _caption(item: SourceItem, rules: Rules) -> FoundCaption:
    given = item.caption or caption_record("").decode()
    if not item.caption_path:
        return FoundCaption(given, None)
    return read_caption(item.caption_path, given, rules.settings.limits.caption_bytes, rules.sidecars_of(item))


def _row(rules: Rules, item: SourceItem, stamp: FileStamp) -> CatalogRow:
    settings = rules.settings
    if stamp.file_bytes > settings.limits.image_bytes:
        raise ValueError(f"has {stamp.file_bytes:,} bytes; at most {settings.limits.image_bytes:,} are read")
    held_out = settings.validation_fraction > 0 and draw_uniform("split", item.key) < settings.validation_fraction
    payload, mask, content = _payload(settings, item), item.mask, None
    if item.kind == "latents":
        if settings.mode == "images":
            raise ValueError("is a file of latents, which data.mode: images does not use")
        if not stamp.file_bytes:
            raise ValueError("is empty")
        placement = _placement_of_latents(item.bucket_hw or _bucket_hw(item, settings.limits))
        original_hw = item.original_hw or _sides(placement.bucket)
    else:
        original_hw = item.original_hw if item.length == ROW and item.original_hw else _image_hw(item, settings.limits)
        placement = place(original_hw, rules.buckets, settings.buckets)
        mask = _mask(item, original_hw, settings.limits)
        if payload == "encode":
            content = fingerprint(item.file, item.offset, item.length, mask)
    caption = _caption(item, rules)
    return CatalogRow(
        key=item.key,
        path=item.file,
        offset=item.offset,
        length=item.length,
        payload=payload,
        stamp=stamp,
        caption=caption.record,
        repeats=1 if held_out else item.repeats,
        split="validation" if held_out else "train",
        original_hw=original_hw,
        placement=placement,
        mask=mask,
        content=content,
        foreign=caption.foreign,
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


def _caption_stamp(item: SourceItem, sidecars: Sidecars) -> int:
    """Differs where the caption does, or the image's own loss weight, or what its files are said to hold."""
    caption = item.caption or ""
    if not item.caption_path:
        return zlib.crc32(caption.encode())
    if not sidecars.are_plain:
        tags_path = sidecars.tags_path(item.caption_path)
        times = _mtime_ns(item.caption_path), _mtime_ns(tags_path) if tags_path else 0
        return draw_seed("sidecars", *times, caption, repr(sidecars))
    is_plain = WEIGHT_MARK not in caption and (not caption or caption.startswith(_PLAIN))
    return _mtime_ns(item.caption_path) + (0 if is_plain else zlib.crc32(caption.encode()))


def _mtime_ns(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns  # noqa: PTH116
    except OSError:
        return 0

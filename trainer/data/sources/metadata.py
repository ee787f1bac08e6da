"""kohya's metadata: one JSON object of entries (`meta_lat.json`, of any size), or JSON lines; read as a stream.

    {"danbooru/1": {"tags": "1girl, solo", "caption": "a girl", "train_resolution": [896, 1152], "image_size": [w, h]}}
    {"image_path": "a/b.jpg", "tags": "1girl, solo", "caption": "a girl", "image_size": [w, h]}

Every field but the key may be missing. Pairs are width, then height.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ijson

from trainer.data.captions import caption_record
from trainer.data.sources.bounded_json import BoundedJson
from trainer.data.sources.columns import loss_weight_of, score_of
from trainer.errors import UserError, printable
from trainer.guards import DEFAULT_LIMITS, Limits, open_regular

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BLANK_BYTES = 4096
_STEP_PX = 8
_MOST_PX = 1 << 16


class MetadataEntry(NamedTuple):
    """One entry; `caption` is the record that shards hold, sizes are (height, width)."""

    key: str
    caption: str
    original_hw: tuple[int, int] | None
    """Size of the image file."""
    bucket_hw: tuple[int, int] | None
    """Size of the bucket, a multiple of 8."""
    problem: str
    """Why the entry cannot be used, or nothing."""


def read_metadata(
    path: Path,
    weight_field: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
    score_field: str | None = None,
) -> Iterator[MetadataEntry]:
    """All entries in the file's order; what is wrong with one is told in its `problem`.

    Args:
        weight_field: of an entry's own loss weight; None: it has none.
        score_field: the same of its score.

    Raises:
        UserError: the file as a whole cannot be read, or not beyond some place.
    """
    entries = _json_lines if path.suffix.lower() == ".jsonl" else _json_object
    rules = _Rules(weight_field, score_field, limits.image_pixels)
    try:
        with open_regular(path) as file:
            for key, fields in entries(file, str(path), limits):
                yield _entry(key, fields, rules)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class _Rules:
    weight_field: str | None
    score_field: str | None
    most_pixels: int


def _json_object(file: BinaryIO, said: str, limits: Limits) -> Iterator[tuple[str, Any]]:
    if file.read(3) != _BYTE_ORDER_MARK:
        file.seek(0)
    begin = file.tell()
    first = file.read(_BLANK_BYTES).lstrip()[:1]
    if first and first != b"{":
        raise UserError(f"{said}: must be one JSON object of entries; it begins with {first.decode('latin-1')!r}")
    file.seek(begin)
    try:
        yield from ijson.kvitems(BoundedJson(file, said, limits), "", use_float=True)
    except (ijson.JSONError, ValueError, OverflowError) as error:
        hint = "; if each line is an object, name it .jsonl" if "trailing" in _one_line(error) else ""
        raise UserError(f"{said}: is not valid JSON ({_one_line(error)}), near byte {file.tell():,}{hint}") from error


def _json_lines(file: BinaryIO, said: str, limits: Limits) -> Iterator[tuple[str, Any]]:
    longest, number = 4 * limits.caption_bytes, 0
    while line := file.readline(longest + 1):
        number += 1
        if len(line) > longest:
            while line and not line.endswith(b"\n"):
                line = file.readline(longest)
            yield f"line {number}", f"has more than {longest:,} bytes; no more are read"
            continue
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield f"line {number}", f"is not valid JSON ({_one_line(error)})"
            continue
        key = fields.get("image_path") if isinstance(fields, dict) else None
        if isinstance(key, str) and key:
            yield key, fields
        else:
            yield f"line {number}", "has no image_path"


def _entry(key: str, fields: Any, rules: _Rules) -> MetadataEntry:
    if not isinstance(fields, dict):
        reason = fields if key.startswith("line ") and isinstance(fields, str) else "its metadata is no JSON object"
        return MetadataEntry(key, "", None, None, reason)
    try:
        key.encode()
    except UnicodeEncodeError:
        shown = key.encode(errors="backslashreplace").decode()
        return MetadataEntry(shown, "", None, None, "its key is no Unicode text")
    try:
        caption, tags = fields.get("caption"), fields.get("tags")
        if not isinstance(caption, str):
            caption = _text(caption, "caption")
        if not isinstance(tags, str):
            tags = _text(tags, "tags")
        weight = loss_weight_of(fields.get(rules.weight_field)) if rules.weight_field else 1.0
        score = score_of(fields.get(rules.score_field)) if rules.score_field else None
        original_hw, bucket_hw = _hw(fields, "image_size"), _hw(fields, "train_resolution")
    except ValueError as error:
        return MetadataEntry(key, "", None, None, str(error))
    if bucket_hw is not None:
        # As kohya does when it writes latents: the size in the file may be from before the buckets.
        bucket_hw = (bucket_hw[0] // _STEP_PX * _STEP_PX, bucket_hw[1] // _STEP_PX * _STEP_PX)
        if not all(bucket_hw):
            return MetadataEntry(key, "", None, None, "its metadata has a train_resolution below 8 px")
        if bucket_hw[0] * bucket_hw[1] > rules.most_pixels:
            return MetadataEntry(key, "", None, None, f"its train_resolution is beyond {rules.most_pixels:,} pixels")
    return MetadataEntry(key, _record(caption.strip(), tags.strip(), weight, score), original_hw, bucket_hw, "")


def _record(caption: str, tags: str, weight: float, score: float | None) -> str:
    try:
        return caption_record(caption, tags, weight, score).decode()
    except UnicodeEncodeError:  # half a character, written as an escape
        caption, tags = (text.encode(errors="replace").decode() for text in (caption, tags))
        return caption_record(caption, tags, weight, score).decode()


def _text(value: object, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return _joined(value, name)
    raise ValueError(f"its metadata has a {name} that is no text")


def _joined(values: Iterable[str], name: str) -> str:
    return (", " if name == "tags" else "\n").join(values)


def _hw(fields: dict[str, Any], name: str) -> tuple[int, int] | None:
    pair = fields.get(name)
    if pair is None:
        return None
    if isinstance(pair, list) and len(pair) == 2:
        width, height = pair
        if type(width) is int and type(height) is int and 0 < width < _MOST_PX and 0 < height < _MOST_PX:
            return height, width
    raise ValueError(f"its metadata has a {name} that is no pair [width, height] of pixels")


def _one_line(error: Exception) -> str:
    text = error.args[0] if error.args else error
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    return printable(text.split("\n")[0].strip())

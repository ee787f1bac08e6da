"""The snapshot file: which shards a prepared data set consists of, as JSON; `CURRENT` names the newest."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from trainer.data.buckets import Bucket
from trainer.data.store.edits import Edit
from trainer.data.store.shards import SECTIONS, ShardInfo
from trainer.errors import UserError
from trainer.guards import Refused, read_json, read_text

SNAPSHOT_FORMAT = "sdxl-train snapshot 4"
_NO_SHARED_TEXT = (
    "sdxl-train snapshot 3"  # of several resolutions, each of which has the text that is cached, or none has
)
_ONE_RESOLUTION = "sdxl-train snapshot 2"  # as sets of one resolution are still written, for older versions to read
_FORMATS = (
    "sdxl-train snapshot 1",
    _ONE_RESOLUTION,
    _NO_SHARED_TEXT,
    SNAPSHOT_FORMAT,
)  # the first has no edits and no parts
_NAME = re.compile(r"\d{6,12}\.json")
_SPLITS = ("train", "validation")
_MOST_NAME_BYTES = 4096
_MOST_COUNT, _MOST_SIZE = 1 << 48, 1 << 16


class Part(NamedTuple):
    """Rows of a shard that follow each other and are of one source, by its name; virtual rows count repeats."""

    source: str
    rows: int
    virtual_rows: int


@dataclass(frozen=True)
class ShardEntry:
    """A shard as the snapshot lists it.

    Attributes:
        name: relative to the prepared folder.
        info: of the file.
        edit: what has changed of its rows since it was written.
        parts: its rows that count, by source, in their order; of snapshots of the first format none.
        resolution: 0: the main one; else the images are those of another shard, at this resolution as well.
        rows_of: the name of that shard, whose rows these are, in the same order. Cached text is in that one, and only
            in shards of older versions in this one as well.
    """

    name: str
    split: str
    bucket: Bucket
    info: ShardInfo
    edit: Edit | None = None
    parts: tuple[Part, ...] = ()
    resolution: int = 0
    rows_of: str = ""

    @property
    def rows(self) -> int:
        """Images that count."""
        return self.info.rows if self.edit is None else self.edit.rows

    @property
    def virtual_rows(self) -> int:
        """Images that count, times their repeats."""
        return self.info.virtual_rows if self.edit is None else self.edit.virtual_rows

    @property
    def uniform_repeats(self) -> int:
        """The repeats of each of them, or 0 where they differ."""
        return self.info.uniform_repeats if self.edit is None else self.edit.uniform_repeats


@dataclass(frozen=True)
class Snapshot:
    """What one snapshot file holds."""

    number: int
    generations: tuple[int, ...]
    settings: dict[str, Any]
    shards: tuple[ShardEntry, ...]


def snapshot_name(number: int) -> str:
    """File name of a snapshot; later ones sort later."""
    return f"{number:06d}.json"


def current_snapshot(prepared: Path) -> str | None:
    """The name that CURRENT holds, such as `000001.json`; None where nothing has been committed. UserError where it
    cannot be read."""
    path = prepared / "CURRENT"
    try:
        return read_text(path, _MOST_NAME_BYTES).strip()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def snapshot_to_json(snapshot: Snapshot) -> str:
    """One list per column, so that thousands of shards stay small and quick to read."""
    shards, infos = snapshot.shards, [shard.info for shard in snapshot.shards]
    present = [name for name in SECTIONS if any(info.offsets[name] >= 0 for info in infos)]
    names = sorted({part.source for shard in shards for part in shard.parts})
    numbers = {name: number for number, name in enumerate(names)}
    has_more = any(shard.resolution for shard in shards)
    places = {shard.name: place for place, shard in enumerate(shards)} if has_more else {}
    document = {
        "format": _format(shards),
        "number": snapshot.number,
        "generations": snapshot.generations,
        "settings": snapshot.settings,
        "sources": names,
        "shards": {
            "name": [shard.name for shard in shards],
            "split": [shard.split for shard in shards],
            "bucket_hw": [[shard.bucket.height_px, shard.bucket.width_px] for shard in shards],
            "rows": [info.rows for info in infos],
            "virtual_rows": [info.virtual_rows for info in infos],
            "uniform_repeats": [info.uniform_repeats for info in infos],
            "file_bytes": [info.file_bytes for info in infos],
            "header_crc32c": [info.header_crc32c for info in infos],
            "text_shape": next((info.text_shape for info in infos if info.text_shape), None),
            "offsets": {name: [info.offsets[name] for info in infos] for name in present},
            "edit": [None if shard.edit is None else list(asdict(shard.edit).values()) for shard in shards],
            "parts": [[[numbers[part.source], *part[1:]] for part in shard.parts] for shard in shards],
            **({"resolution": [shard.resolution for shard in shards]} if has_more else {}),
            **({"rows_of": [places.get(shard.rows_of, -1) for shard in shards]} if has_more else {}),
        },
    }
    return json.dumps(document, ensure_ascii=False, indent=None, separators=(",", ":")) + "\n"


def read_snapshot(prepared: Path, name: str) -> Snapshot:
    """UserError where the file is missing, was altered, or is no snapshot that this version reads."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{prepared / 'CURRENT'}: must name a snapshot, such as 000001.json; it holds {name[:60]!r}")
    path = prepared / "snapshots" / name
    try:
        document = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such snapshot of the prepared data set") from None
    except Refused as error:
        raise UserError(f"{path}: cannot be read as a snapshot ({str(error).removeprefix(f'{path}: ')})") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found not in _FORMATS:
        raise UserError(f"{path}: is of format '{str(found)[:60]}', this version reads '{SNAPSHOT_FORMAT}'")
    try:
        return _snapshot(document)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(f"{path}: was altered or is damaged: {reason}") from error


def _snapshot(document: dict[str, Any]) -> Snapshot:
    """Raises any of what `read_snapshot` catches where the document is not as `snapshot_to_json` makes it."""
    columns, settings = document["shards"], document["settings"]
    offsets, shape = columns["offsets"], columns["text_shape"]
    if not isinstance(settings, dict):
        raise ValueError("its settings are no object")
    if not (shape is None or (len(shape) == 3 and all(map(_is_size, shape)))):
        raise ValueError("text_shape is not three sizes")
    count, names = len(columns["name"]), document.get("sources", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its sources are no names")
    edits, parts = columns.get("edit", [None] * count), columns.get("parts", [[]] * count)
    resolutions, mains = columns.get("resolution", [0] * count), columns.get("rows_of", [-1] * count)
    has_text = [at >= 0 for at in offsets.get("text_hidden", [-1] * count)]
    for column, values in [*columns.items(), *offsets.items()]:
        if column not in ("text_shape", "offsets") and (not isinstance(values, list) or len(values) != count):
            raise ValueError(f"{column} is not {count} values")
    entries = tuple(
        ShardEntry(
            name=shard_name,
            split=columns["split"][i],
            bucket=Bucket(*columns["bucket_hw"][i]),
            info=ShardInfo(
                rows=columns["rows"][i],
                virtual_rows=columns["virtual_rows"][i],
                uniform_repeats=columns["uniform_repeats"][i],
                file_bytes=columns["file_bytes"][i],
                header_crc32c=columns["header_crc32c"][i],
                offsets={name: offsets[name][i] if name in offsets else -1 for name in SECTIONS},
                text_shape=(shape[0], shape[1], shape[2]) if shape and has_text[i] else None,
                excluded=(),
            ),
            edit=None if edits[i] is None else _edit(edits[i]),
            parts=tuple(_part(names, part) for part in parts[i]),
            resolution=resolutions[i],
            rows_of=columns["name"][mains[i]] if resolutions[i] else "",
        )
        for i, shard_name in enumerate(columns["name"])
    )
    for entry in entries:
        _check_entry(entry)
    if any(resolutions):
        _check_resolutions(entries)
    number, generations = document["number"], document["generations"]
    if not _is_count(number) or not all(map(_is_count, generations)):
        raise ValueError("its number or its generations are no whole numbers")
    return Snapshot(number, tuple(generations), settings, entries)


def _format(shards: Sequence[ShardEntry]) -> str:
    """The oldest that tells all of them, so that older versions read what they can."""
    further = [shard for shard in shards if shard.resolution]
    if not further:
        return _ONE_RESOLUTION
    has_text = any(shard.info.text_shape for shard in shards)
    return SNAPSHOT_FORMAT if has_text and not all(shard.info.text_shape for shard in further) else _NO_SHARED_TEXT


def _check_resolutions(entries: tuple[ShardEntry, ...]) -> None:
    """Raises ValueError where a shard does not hold the images that another one holds."""
    mains = {entry.name: entry for entry in entries if entry.resolution == 0}
    for entry in entries:
        if not _is_count(entry.resolution):
            raise ValueError(f"{entry.name} has a resolution that is no whole number")
        main = mains.get(entry.rows_of)
        if entry.resolution and (main is None or (main.split, main.parts) != (entry.split, entry.parts)):
            raise ValueError(f"{entry.name} does not hold the images of another shard")


def _edit(values: list[int]) -> Edit:
    if len(values) != len(fields(Edit)) or not all(map(_is_count, values)):
        raise ValueError("an edit is not eight whole numbers")
    return Edit(*values)


def _part(names: list[str], values: list[int]) -> Part:
    number, rows, virtual_rows = values
    if not all(map(_is_count, values)):
        raise ValueError("a part is not three whole numbers")
    return Part(names[number], rows, virtual_rows)


def _check_entry(entry: ShardEntry) -> None:
    """Raises ValueError where a shard's facts cannot be those of a file: memory and reads go by them."""
    info, name = entry.info, entry.name
    if not isinstance(name, str) or name.startswith("/") or not name.isprintable() or ".." in name.split("/"):
        raise ValueError(f"{str(name)[:60]!r} is no name of a shard")
    counts = (info.rows, info.virtual_rows, info.uniform_repeats, info.file_bytes, info.header_crc32c)
    if not all(map(_is_count, counts)) or not all(type(at) is int for at in info.offsets.values()):
        raise ValueError(f"{name} has facts that are no whole numbers")
    if not all(map(_is_size, (entry.bucket.height_px, entry.bucket.width_px))) or entry.split not in _SPLITS:
        raise ValueError(f"{name} has no split or no bucket that there is")
    repeats_fit = info.virtual_rows == info.rows * info.uniform_repeats or not info.uniform_repeats
    if not repeats_fit or info.rows > info.file_bytes or (info.virtual_rows and not info.rows):
        raise ValueError(f"{name} has {info.rows} rows and {info.virtual_rows} with repeats, which do not go together")
    if not all(-1 <= at <= info.file_bytes for at in info.offsets.values()):
        raise ValueError(f"{name} has sections beyond its end")
    edit = entry.edit
    if edit is not None and (
        max(edit.rows, edit.changed) > info.rows
        or (edit.uniform_repeats and edit.virtual_rows != edit.rows * edit.uniform_repeats)
        or (edit.virtual_rows and not edit.rows)
    ):
        raise ValueError(f"{name} has an edit that does not fit it")
    sums = tuple(map(sum, zip(*[part[1:] for part in entry.parts], strict=True)))
    if entry.parts and sums != (entry.rows, entry.virtual_rows):
        raise ValueError(f"{name} has parts that are not all of it")


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST_COUNT


def _is_size(value: object) -> bool:
    return type(value) is int and 0 < value <= _MOST_SIZE

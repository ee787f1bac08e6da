"""What tables and tars of images have in common: which files are meant, and the texts as people store them."""

import glob
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from trainer.data.captions import MOST_LOSS_WEIGHT, caption_record
from trainer.errors import UserError

_WILDCARDS = ("*", "?", "[")


def files_below(place: Path, ending: str, field: str) -> list[tuple[str, str]]:
    """The files that a folder (searched recursively), a pattern or a single path names, sorted by path.

    Returns:
        Pairs of the path and its name in keys: the path below the folder, or below the part of the pattern that
        holds no wildcards, without the ending.

    Raises:
        UserError: there are none.
    """
    if place.is_dir():
        root, found = str(place), [str(path) for path in place.rglob(f"*{ending}")]
    elif place.is_file():
        root, found = str(place.parent), [str(place)]
    else:
        parts = place.parts
        fixed = next((i for i, part in enumerate(parts) if any(sign in part for sign in _WILDCARDS)), len(parts) - 1)
        root, found = str(Path(*parts[:fixed])), glob.glob(str(place), recursive=True)  # noqa: PTH207 - may be absolute
    if not found:
        raise UserError(f"data.sources: {field} ({place}): there is no {ending} file")
    return [(path, os.path.relpath(path, root).removesuffix(ending)) for path in sorted(found)]


def text_of(value: object, joint: str = ", ") -> str:
    """A caption or tags as they stand in data sets: text, or a list of texts, which are joined; else empty."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return joint.join(stripped for part in value if isinstance(part, str) and (stripped := part.strip()))
    return ""


def loss_weight_of(value: object) -> float:
    """An image's own loss weight as it stands in data sets; 1 where there is none.

    Raises:
        ValueError: it is no weight, why, as the reason to leave the image out.
    """
    if value is None:
        return 1.0
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= MOST_LOSS_WEIGHT:
        return float(value)
    raise ValueError(f"its loss weight is {str(value)[:40]!r}, not a number above 0 and at most {MOST_LOSS_WEIGHT:g}")


class TableColumns(Protocol):
    """What sources that are tables say of their columns."""

    @property
    def image_column(self) -> str: ...

    @property
    def caption_column(self) -> str: ...

    @property
    def tags_column(self) -> str | None: ...

    @property
    def key_column(self) -> str | None: ...

    @property
    def masks(self) -> str: ...

    @property
    def mask_column(self) -> str: ...

    @property
    def weight_column(self) -> str | None: ...


def text_columns(source: TableColumns, found: Collection[str], place: str) -> list[str]:
    """The columns that are read beside the image and its mask.

    Args:
        found: columns of the table; place: how a person knows it.

    Raises:
        UserError: the table lacks a column.
    """
    fields = ("image_column", "caption_column", "tags_column", "key_column", "weight_column")
    named = {field: column for field in fields if (column := getattr(source, field)) is not None}
    named |= {"mask_column": source.mask_column} if source.masks == "column" else {}
    for field, column in named.items():
        if column not in found:
            raise UserError(f"data.sources: {field} = {column}: {place} has no such column; it has {', '.join(found)}")
    return list({column: None for field, column in named.items() if field not in ("image_column", "mask_column")})


def row_key(source: TableColumns, key: str, fields: Mapping[str, Any]) -> str:
    """A row's key, with the value of the key column behind it."""
    return f"{key}:{fields[source.key_column]}" if source.key_column else key


def row_captions(source: TableColumns, fields: Mapping[str, Any]) -> str:
    """A row's caption, tags and loss weight as a caption record; ValueError where the weight is none."""
    tags = text_of(fields[source.tags_column]) if source.tags_column else ""
    weight = loss_weight_of(fields[source.weight_column]) if source.weight_column else 1.0
    return caption_record(text_of(fields[source.caption_column], "\n"), tags, weight).decode()


def path_problem(row: int, path: object, image: str = "") -> str:
    """Why a row that holds no image's bytes has none by its path either; empty: the path may be one.

    Args:
        image: the column, where it is to be named.
    """
    if not isinstance(path, str) or not path:
        return f"row {row} holds no image{f' ({image})' if image else ''}"
    if "://" in path.removeprefix("file://"):
        return f"row {row} names {path}, which is not on this disk"
    return ""

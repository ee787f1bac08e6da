"""What tables and tars of images have in common: which files are meant, and the texts as people store them."""

import glob
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol

from trainer.data.captions import MOST_CAPTION_WEIGHT, MOST_LOSS_WEIGHT, Captions, caption_record
from trainer.data.sources.folder_walk import walk_folders
from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, Limits

_MOST_SCORE = 1e15
_WILDCARDS = ("*", "?", "[")


def files_below(
    place: Path,
    ending: str,
    field: str,
    ignored: Counter[str],
    limits: Limits = DEFAULT_LIMITS,
) -> list[tuple[str, str]]:
    """The files that a folder (searched recursively), a pattern or a single path names, sorted by path.

    Returns:
        Pairs of the path and its name in keys: the path below the folder, or below the part of the pattern that
        holds no wildcards, without the ending.

    Raises:
        UserError: there are none.
    """
    try:
        if place.is_dir():
            root = str(place)
            found = [entry.path for _, entry in walk_folders([root], limits, ignored) if entry.name.endswith(ending)]
        elif place.is_file():
            root, found = str(place.parent), [str(place)]
        else:
            root, found = _matches(place, limits)
    except OSError as error:
        raise UserError(
            f"data.sources: {field} ({place}): {error.filename} cannot be read: {error.strerror}"
        ) from error
    if not found:
        raise UserError(f"data.sources: {field} ({place}): there is no {ending} file")
    return [(path, os.path.relpath(path, root).removesuffix(ending)) for path in sorted(found)]


def _matches(place: Path, limits: Limits) -> tuple[str, list[str]]:
    """The part of a pattern that holds no wildcards, and what the pattern names; `**` stands for any folders."""
    parts = place.parts
    fixed = next((i for i, part in enumerate(parts) if any(sign in part for sign in _WILDCARDS)), len(parts) - 1)
    root = str(Path(*parts[:fixed]))
    if "**" not in parts:
        return root, glob.glob(str(place))  # noqa: PTH207 - may be absolute
    # `glob` would follow links that lead in circles.
    found = [entry.path for _, entry in walk_folders([root], limits, Counter())] if Path(root).is_dir() else []
    return root, [path for path in found if _fits(Path(os.path.relpath(path, root)).parts, parts[fixed:])]


def _fits(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern or not parts:
        return not pattern and not parts
    if pattern[0] == "**":
        return any(_fits(parts[i:], pattern[1:]) for i in range(len(parts)))
    return fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def text_of(value: object, joint: str = ", ") -> str:
    """A caption or tags as they stand in data sets: text, or a list of texts, which are joined; else empty."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list):
        return joint.join(stripped for part in value if isinstance(part, str) and (stripped := part.strip()))
    return ""


def captions_of(value: object) -> str | Captions:
    """Captions as JSON holds them: text; or a list of texts and of objects with `text` and `weight` (1 if not given).

    Returns:
        Text, of several lines where there are several captions that weigh the same; else each with its weight.

    Raises:
        ValueError: it is something else, as the reason to leave the image out.
    """
    if value is None or isinstance(value, str):
        return (value or "").strip()
    if not isinstance(value, list):
        raise ValueError("its caption is neither text nor a list")
    found = tuple(pair for entry in value if (pair := _weighted(entry))[0])
    if len({weight for _, weight in found}) < 2:
        return "\n".join(text for text, _ in found)
    return found


def _weighted(entry: object) -> tuple[str, float]:
    """One of several captions on one line, and its weight."""
    text, weight = (entry.get("text"), entry.get("weight", 1)) if isinstance(entry, dict) else (entry, 1)
    if not isinstance(text, str):
        raise ValueError("one of its captions is neither text nor an object with `text` and `weight`")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MOST_CAPTION_WEIGHT:
        rule = f"not a number above 0 and at most {MOST_CAPTION_WEIGHT:g}"
        raise ValueError(f"the weight of one of its captions is {str(weight)[:40]!r}, {rule}")
    return " ".join(filter(None, map(str.strip, text.split("\n")))), float(weight)


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


def score_of(value: object) -> float | None:
    """An image's score as it stands in data sets; None where there is none.

    Raises:
        ValueError: it is no number, why, as the reason to leave the image out.
    """
    if value is None:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST_SCORE:
        return float(value)
    raise ValueError(f"its score is {str(value)[:40]!r}, not a number")


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

    @property
    def score_column(self) -> str | None: ...


def text_columns(source: TableColumns, found: Collection[str], place: str) -> list[str]:
    """The columns that are read beside the image and its mask.

    Args:
        found: columns of the table; place: how a person knows it.

    Raises:
        UserError: the table lacks a column.
    """
    fields = ("image_column", "caption_column", "tags_column", "key_column", "weight_column", "score_column")
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
    """A row's caption, tags, loss weight and score as a caption record; ValueError where one is no such number."""
    tags = text_of(fields[source.tags_column]) if source.tags_column else ""
    weight = loss_weight_of(fields[source.weight_column]) if source.weight_column else 1.0
    score = score_of(fields[source.score_column]) if source.score_column else None
    return caption_record(text_of(fields[source.caption_column], "\n"), tags, weight, score).decode()


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

"""What tables and tars of images have in common: which files are meant, and the texts as people store them."""

import glob
import os
from pathlib import Path

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

"""Finds the nearest right spelling of a name, and of a path that does not exist."""

import difflib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

NAMES_READ = 10_000  # of one folder: image folders hold millions


def nearest(word: str, names: Iterable[str], likeness: float = 0.6) -> str | None:
    """The name most like `word` (case, `-` and `_` do not count), or None when none is like it."""
    folded = {name.lower().replace("-", "_"): name for name in names}
    found = difflib.get_close_matches(word.lower().replace("-", "_"), folded, n=1, cutoff=likeness)
    return folded[found[0]] if found else None


def nearest_path(path: Path) -> str:
    """A clause on where a missing path goes wrong, to stand behind the words `no such file`.

    The first part of the path that does not exist is named when it is not the last one; the nearest
    name beside it is offered when there is one.
    """
    try:
        return _nearest_path(path)
    except OSError:  # a folder that may not be read, a name that is too long: then there is no more to say
        return ""


def _nearest_path(path: Path) -> str:
    missing = path
    while not missing.parent.exists() and missing.parent != missing:
        missing = missing.parent
    clause = "" if missing == path else f" (`{missing}` does not exist)"
    with os.scandir(missing.parent) as entries:
        names = [entry.name for entry in itertools.islice(entries, NAMES_READ)]
    names.sort(key=lambda name: Path(name).suffix == missing.suffix)  # the same ending wins
    stems = {Path(name).stem: name for name in names}
    stem = nearest(missing.stem, stems)
    if stem is None:
        return clause
    found = missing.parent / stems[stem]
    offered = found / path.relative_to(missing)
    return f"{clause}; did you mean `{offered if offered.exists() else found}`?"

"""Files below folders, each folder visited once: links may lead in circles, into one another, or to nowhere."""

import errno
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from trainer.guards import Limits

_VISITED = "(link to a folder that was visited)"
_TOO_LONG = "(folder whose path is too long)"


def walk_folders(
    roots: Sequence[str], limits: Limits, ignored: Counter[str]
) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """All entries below the roots that are no folders, each with its root.

    Links to folders are followed after all folders, by name: under which name a file is found does not depend on the
    order in which a disk lists. Nothing is entered that was visited before, is another root, begins with a dot, or lies
    deeper than `limits.folder_depth`.

    Args:
        ignored: what is passed over is counted here, by kind.

    Raises:
        OSError: a folder cannot be read.
    """
    too_deep = f"(folder deeper than limits.folder_depth = {limits.folder_depth})"
    of_roots = {_identity(root): root for root in reversed(roots)}
    if len(of_roots) < len(roots):
        ignored[_VISITED] += len(roots) - len(of_roots)
    visited = set(of_roots)
    waiting = [(root, root, 0) for root in reversed(list(of_roots.values()))]
    links: list[tuple[str, str, int]] = []
    while waiting or links:
        if not waiting:
            links.sort(reverse=True)
            waiting.append(links.pop())
        folder, root, depth = waiting.pop()
        try:
            if depth:
                if (identity := _identity(folder)) in visited:
                    ignored[_VISITED] += 1
                    continue
                visited.add(identity)
            entries = os.scandir(folder)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            ignored[_TOO_LONG] += 1
            continue
        with entries:
            for entry in entries:
                if entry.name.startswith("."):
                    ignored["(hidden)"] += 1
                elif not is_folder(entry):
                    yield root, entry
                elif depth < limits.folder_depth:
                    (links if entry.is_symlink() else waiting).append((entry.path, root, depth + 1))
                else:
                    ignored[too_deep] += 1


def _identity(folder: str) -> tuple[int, int]:
    found = os.stat(folder)  # noqa: PTH116 - no Path object per folder
    return found.st_dev, found.st_ino


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether it is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # links that lead in a circle: no file either, as whoever opens it will say
        return False

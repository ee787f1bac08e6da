"""A folder of images, searched recursively, with a caption file beside each image.

A source yields one `SourceItem` per image, in any order, and holds none of them.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.data.captions import caption_record
from trainer.data.images import EXTENSIONS
from trainer.data.sources.source import SourceItem
from trainer.errors import UserError


@dataclass(frozen=True)
class FolderSource:
    """A folder as the configuration names it; the fields are those of a `data.sources` entry."""

    path: Path
    caption_extension: str = ".txt"
    repeats: int = 1


def source_names(sources: tuple[FolderSource, ...]) -> tuple[str, ...]:
    """The prefix of each source's keys: its folder's name; a later source of the same name gets `~2`, `~3`, ...

    Adding a source at the end leaves the names of the others as they are.
    """
    seen: Counter[str] = Counter()
    names = []
    for source in sources:
        name = source.path.resolve().name
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}~{seen[name]}")
    return tuple(names)


def list_folder(source: FolderSource, name: str, ignored: Counter[str]) -> Iterator[SourceItem]:
    """All images under the folder. Files that are neither images nor captions are counted by ending in `ignored`.

    Links to folders are followed, except to a folder that the link itself lies in. Names that begin with a dot are
    ignored.
    """
    root = str(source.path)
    if not source.path.is_dir():
        raise UserError(f"data.sources: path ({root}): there is no such folder")
    stat = source.path.stat()
    try:
        yield from _walk(source, name, root, ((stat.st_dev, stat.st_ino),), len(root), ignored)
    except PermissionError as error:
        raise UserError(f"data.sources: path ({root}): {error.filename} may not be read") from error


def _walk(
    source: FolderSource,
    name: str,
    folder: str,
    above: tuple[tuple[int, int], ...],
    root_len: int,
    ignored: Counter[str],
) -> Iterator[SourceItem]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                ignored["(hidden)"] += 1
            elif entry.is_dir():
                stat = entry.stat()
                identity = (stat.st_dev, stat.st_ino)
                if identity not in above:
                    yield from _walk(source, name, entry.path, (*above, identity), root_len, ignored)
            else:
                stem, extension = os.path.splitext(entry.path)  # noqa: PTH122 - no Path object per image
                if extension.lower() in EXTENSIONS:
                    key = f"{name}/{stem[root_len:].lstrip('/')}"
                    yield SourceItem(
                        key, entry.path, caption_path=stem + source.caption_extension, repeats=source.repeats
                    )
                elif extension != source.caption_extension:
                    ignored[extension.lower()[:20] or "(none)"] += 1


def read_caption(path: str) -> str:
    """The caption file as the JSON text that shards hold; an empty caption where there is no file.

    Bytes that are not UTF-8 are replaced; a byte order mark and surrounding space are taken off.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig", errors="replace").strip()
    except FileNotFoundError:
        text = ""
    return caption_record(text).decode()

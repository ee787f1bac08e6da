"""kohya's metadata file with the latents or the images that its keys name.

A key is a path without ending relative to the folder, a path with the image's ending, or an absolute path. Latents
lie in `<key>.npz`, or in `<key>_<W>x<H>_sdxl.npz` with the image's size; where both are there, the former counts.
Files of flipped latents (`<key>_flip.npz`) are not used.
"""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.images import EXTENSIONS
from trainer.data.sources.metadata import MetadataEntry, read_metadata
from trainer.data.sources.source import OWN_MASK, SourceItem
from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from trainer.config.sections.data.sources import KohyaJsonSource

_LONGEST_EXTENSION = max(map(len, EXTENSIONS))
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_SIZED = re.compile(r"(?P<stem>.+)_\d{4,}x\d{4,}_sdxl\.npz")


def list_kohya_json(
    source: KohyaJsonSource,
    name: str,
    ignored: Counter[str],
    scratch: Path,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[SourceItem]:
    """An item for each entry of the metadata; one whose file is not there has a `problem`.

    Args:
        ignored: not used, as every entry gives an item.
        scratch: a folder for a temporary table of the entries whose file's name has to be searched for.
    """
    folder = source.latents or source.images
    if folder is None or not folder.is_dir():
        raise UserError(f"data.sources: ({folder}): there is no such folder")
    if source.latents is None:
        return _list_images(source, name, str(folder), limits)
    return _list_latents(source, name, str(folder), scratch, limits)


def image_stem(key: str) -> str:
    """The key without the ending of an image file, if it has one."""
    if "." not in key[-_LONGEST_EXTENSION:]:
        return key
    stem, extension = os.path.splitext(key)  # noqa: PTH122 - no Path object per image
    return stem if extension.lower() in EXTENSIONS else key


def _list_images(source: KohyaJsonSource, name: str, root: str, limits: Limits) -> Iterator[SourceItem]:
    endings = ("", *sorted(EXTENSIONS), *sorted(extension.upper() for extension in EXTENSIONS))
    last = endings[0]
    for entry in read_metadata(source.path, source.weight_field, limits, source.score_field):
        if entry.problem:
            yield _unusable(entry, name, str(source.path), entry.problem)
            continue
        path = os.path.join(root, entry.key)  # noqa: PTH118 - no Path object per image
        for ending in (last, *endings):
            if (stamp := _stamp(path + ending)) is not None:
                last = ending
                yield SourceItem(
                    f"{name}/{entry.key}",
                    path + ending,
                    caption=entry.caption,
                    repeats=source.repeats,
                    file_bytes=stamp[0],
                    mtime_ns=stamp[1],
                    mask=None if source.masks == "none" else OWN_MASK,
                )
                break
        else:
            yield _unusable(entry, name, path, "there is no image of this name")


def _list_latents(source: KohyaJsonSource, name: str, root: str, scratch: Path, limits: Limits) -> Iterator[SourceItem]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder, closing(_WaitingEntries(Path(folder))) as waiting:
        for entry in read_metadata(source.path, source.weight_field, limits, source.score_field):
            if entry.problem:
                yield _unusable(entry, name, str(source.path), entry.problem)
                continue
            stem = image_stem(entry.key)
            stem = stem if stem.startswith("/") else f"{root}/{stem}"
            file = f"{stem}.npz"
            stamp = _stamp(file)
            if stamp is None and entry.original_hw is not None:
                height, width = entry.original_hw
                file = f"{stem}_{width:04d}x{height:04d}_sdxl.npz"
                stamp = _stamp(file)
            if stamp is None:
                waiting.add(stem, entry)
            else:
                yield _latents(source, name, entry, file, stamp)
        for stem, entry, file in waiting.found():
            stamp = _stamp(file) if file else None
            if stamp is None:
                yield _unusable(entry, name, f"{stem}.npz", "there are no latents of this name")
            else:
                yield _latents(source, name, entry, file, stamp)


def _latents(source: KohyaJsonSource, name: str, entry: MetadataEntry, file: str, stamp: tuple[int, int]) -> SourceItem:
    return SourceItem(
        f"{name}/{entry.key}",
        file,
        kind="latents",
        caption=entry.caption,
        repeats=source.repeats,
        original_hw=entry.original_hw,
        bucket_hw=entry.bucket_hw,
        file_bytes=stamp[0],
        mtime_ns=stamp[1],
        mask=None if source.masks == "none" else OWN_MASK,
    )


def _unusable(entry: MetadataEntry, name: str, file: str, problem: str) -> SourceItem:
    return SourceItem(f"{name}/{entry.key}", file, problem=problem)


def _stamp(file: str) -> tuple[int, int] | None:
    """Size and time of a file, or None where there is none, or what is there is a folder or a device."""
    try:
        found = os.stat(file)  # noqa: PTH116 - no Path object per image
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


class _WaitingEntries:
    """Entries whose file bears the image's size in its name, which the metadata does not tell: kept on disk until the
    folders have been looked through."""

    def __init__(self, folder: Path) -> None:
        self._connection = sqlite3.connect(folder / "waiting.sqlite", isolation_level=None)
        self._connection.execute("PRAGMA journal_mode = OFF")
        self._connection.execute("PRAGMA synchronous = OFF")
        self._connection.execute(
            "CREATE TABLE waiting (stem TEXT, key TEXT, caption TEXT, original_h INT, original_w INT, bucket_h INT,"
            " bucket_w INT, file TEXT NOT NULL DEFAULT '')"
        )
        self._connection.execute("BEGIN")

    def add(self, stem: str, entry: MetadataEntry) -> None:
        self._connection.execute(
            "INSERT INTO waiting VALUES (?, ?, ?, ?, ?, ?, ?, '')",
            (stem, entry.key, entry.caption, *(entry.original_hw or (0, 0)), *(entry.bucket_hw or (0, 0))),
        )

    def found(self) -> Iterator[tuple[str, MetadataEntry, str]]:
        """(stem, entry, file) for each that was added; no file where none was found."""
        self._connection.execute("COMMIT")
        if not self._connection.execute("SELECT 1 FROM waiting LIMIT 1").fetchone():
            return
        self._connection.execute("CREATE INDEX by_stem ON waiting (stem)")
        folders = self._connection.execute("SELECT DISTINCT rtrim(stem, replace(stem, '/', '')) FROM waiting")
        for (folder,) in folders.fetchall():
            self._connection.execute("BEGIN")
            self._connection.executemany(
                "UPDATE waiting SET file = :file WHERE stem = :stem AND (file = '' OR file > :file)",
                _sized_files(folder),
            )
            self._connection.execute("COMMIT")
        query = "SELECT stem, key, caption, original_h, original_w, bucket_h, bucket_w, file FROM waiting"
        for stem, key, caption, *sizes, file in self._connection.execute(query):
            original_hw, bucket_hw = (sizes[0], sizes[1]), (sizes[2], sizes[3])
            entry = MetadataEntry(
                key, caption, original_hw if any(original_hw) else None, bucket_hw if any(bucket_hw) else None, ""
            )
            yield stem, entry, file

    def close(self) -> None:
        self._connection.close()


def _sized_files(folder: str) -> Iterator[dict[str, str]]:
    """`stem` and `file` of all latents in the folder whose names end with a size."""
    try:
        entries = os.scandir(folder)
    except OSError:
        return
    with entries:
        for entry in entries:
            # Names that are not UTF-8 cannot be those of keys.
            if (match := _SIZED.fullmatch(entry.name)) and not _HALF_CHARACTER.search(entry.name):
                yield {"stem": folder + match["stem"], "file": folder + entry.name}

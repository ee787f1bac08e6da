"""A folder of images, searched recursively, with a caption file beside each image (`sidecars.py`).

With `kohya_repeats` it is kohya's layout: `<repeats>_<words>/image.png`; see `FolderSource`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.data.images import EXTENSIONS
from trainer.data.sources.columns import loss_weight_of
from trainer.data.sources.folder_walk import is_folder, walk_folders
from trainer.data.sources.source import OWN_MASK, MaskPlace, SourceItem
from trainer.errors import UserError, printable
from trainer.guards import DEFAULT_LIMITS, Limits, Refused, decode_text, open_regular

if TYPE_CHECKING:
    from trainer.config.sections.data.sources import FolderSource

_MASK_ENDINGS = (*sorted(EXTENSIONS), *sorted(extension.upper() for extension in EXTENSIONS))
_EMPTY = '{"caption":""}'
_MOST_WEIGHT_BYTES = 256  # what is longer is no number
_NUMBER = re.compile(r"\d*\.?\d+([eE][+-]?\d+)?")
_REPEATS = re.compile(r"(?P<repeats>[1-9]\d{0,8})_(?P<words>.*)")


def list_folder(
    source: FolderSource,
    name: str,
    ignored: Counter[str],
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[SourceItem]:
    """All images under the folder. Files that are neither images nor captions are counted by ending in `ignored`.

    Links to folders are followed, each folder is visited once. Names that begin with a dot are ignored; with
    `kohya_repeats` also what lies in no folder of that layout.
    """
    root = str(source.path)
    if not source.path.is_dir():
        raise UserError(f"data.sources: path ({root}): there is no such folder")
    try:
        walks = dict(_walks(source, name, root, ignored))
        for folder, entry in walk_folders(list(walks), limits, ignored):
            item = _item(walks[folder], entry)
            if item is not None:
                yield item
    except OSError as error:
        raise UserError(f"data.sources: path ({root}): {error.filename} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class _Walk:
    """What stays the same while a folder is searched."""

    source: FolderSource
    name: str
    root_len: int
    repeats: int
    caption: str | None
    """The caption record of images without a caption file."""
    ignored: Counter[str]


def _walks(source: FolderSource, name: str, root: str, ignored: Counter[str]) -> Iterator[tuple[str, _Walk]]:
    """The folders that are searched: the root, or in kohya's layout those in it that say how often they count."""
    if not source.kohya_repeats:
        yield root, _Walk(source, name, len(root), source.repeats, _default(source), ignored)
        return
    with os.scandir(root) as entries:
        for entry in sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name)):
            counted = _REPEATS.fullmatch(entry.name) if is_folder(entry) else None
            if counted is None:
                ignored["(outside of <repeats>_<words> folders)"] += 1
            else:
                repeats = source.repeats * int(counted["repeats"])
                yield entry.path, _Walk(source, name, len(root), repeats, _default(source, counted["words"]), ignored)


def _item(walk: _Walk, entry: os.DirEntry[str]) -> SourceItem | None:
    caption_extension = walk.source.caption_extension
    stem, extension = os.path.splitext(entry.path)  # noqa: PTH122 - no Path object per image
    if entry.name.endswith(walk.source.mask_suffix):
        if walk.source.masks != "files":
            walk.ignored["(mask that is not used)"] += 1
        return None
    if extension.lower() not in EXTENSIONS:
        if extension not in (caption_extension, walk.source.weight_extension, walk.source.tags_extension):
            walk.ignored[printable(extension.lower()[:20]) or "(none)"] += 1
        return None
    caption, problem = walk.caption, ""
    if walk.source.weight_extension is not None:
        caption, problem = _with_weight(caption, stem + walk.source.weight_extension)
    return SourceItem(
        f"{walk.name}/{stem[walk.root_len :].lstrip('/')}",
        entry.path,
        caption=caption,
        caption_path=stem + caption_extension,
        repeats=walk.repeats,
        mask=None if walk.source.masks == "none" else _mask(walk, stem),
        problem=problem,
    )


def _mask(walk: _Walk, stem: str) -> MaskPlace | None:
    """That of an image whose path without ending is `stem`."""
    source = walk.source
    if source.masks == "alpha":
        return OWN_MASK
    if source.mask_folder is None:
        files = (stem + source.mask_suffix,)
    else:
        files = (f"{source.mask_folder}{stem[walk.root_len :]}{ending}" for ending in _MASK_ENDINGS)
    return next((MaskPlace(file) for file in files if os.path.exists(file)), None)  # noqa: PTH110


def _default(source: FolderSource, words: str = "") -> str | None:
    """The record of an image without a caption file; its one field is the one that such files fill."""
    if source.caption_files_hold == "caption" and not words:
        return None
    return json.dumps({source.caption_files_hold: words}, ensure_ascii=False, separators=(",", ":"))


def _with_weight(caption: str | None, path: str) -> tuple[str | None, str]:
    """The record of an image without a caption file, with the weight that the file holds; and what is wrong with it."""
    try:
        with open_regular(path) as file:
            text = decode_text(file.read(_MOST_WEIGHT_BYTES), path).text.strip()
    except FileNotFoundError:
        return caption, ""
    except OSError as error:
        return caption, f"its loss weight cannot be read: {error.strerror}"
    except Refused as error:
        return caption, f"its loss weight {error.reason_for(path)}"
    try:
        weight = loss_weight_of(float(text) if _NUMBER.fullmatch(text) else text)
    except ValueError as error:
        return caption, str(error)
    fields = {**json.loads(caption or _EMPTY), "loss_weight": weight}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")), ""

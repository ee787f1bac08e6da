"""What kind of data set lies at a path, by a short look at its names; nothing is opened."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.spelling import nearest_path
from trainer.data.images import EXTENSIONS
from trainer.errors import UserError

_MOST = 50_000  # names that are looked at
_CAPTIONS = (".txt", ".caption", ".json", ".tags")
_KOHYA = re.compile(r"\d+_\S.*")


@dataclass(frozen=True)
class FoundImages:
    """What was found.

    Attributes:
        source: an entry of `data.sources`.
        images: how many there are; None: more than were looked at, or in archives.
        told: in words, for a person.
        has_tags: captions are files of tags.
    """

    source: dict[str, Any]
    images: int | None
    told: str
    has_tags: bool = False


def look_at(place: Path) -> FoundImages:
    """A folder of images with captions beside them, kohya's folders, parquet files, tars, or kohya's metadata.

    Raises:
        UserError: there is nothing that can be trained on.
    """
    if place.is_file() and place.suffix.lower() in (".json", ".jsonl"):
        source = {"type": "kohya_json", "path": str(place), "images": str(place.parent)}
        return FoundImages(source, None, f"metadata of kohya's; images are looked for in {place.parent}")
    if place.is_file() and place.suffix.lower() == ".parquet":
        return FoundImages({"type": "parquet", "files": str(place)}, None, "a parquet file")
    if not place.is_dir():
        meant = "" if place.exists() else nearest_path(place)
        raise UserError(f"{place}: no such folder of images, parquet file or metadata file{meant}")
    endings, names, is_all = _endings(place)
    images = sum(count for ending, count in endings.items() if ending in EXTENSIONS)
    if not images:
        return _archives(place, endings)
    caption = max(_CAPTIONS, key=lambda ending: endings[ending])
    captions = endings[caption]
    source: dict[str, Any] = {"path": str(place)}
    if captions and caption != ".txt":
        source |= {"caption_extension": caption}
    if caption == ".tags":
        source |= {"caption_files_hold": "tags"}
    folders = [name for name in names if _KOHYA.fullmatch(name)]
    if folders and len(folders) == len(names):
        source |= {"kohya_repeats": True}
    more = "" if is_all else " or more"
    beside = f"{captions:,} {caption} files beside them" if captions else "no caption files"
    told = f"{images:,}{more} images, {beside}"
    told += f", in kohya's folders such as {folders[0]}" if source.get("kohya_repeats") else ""
    return FoundImages(source, images if is_all else None, told, caption == ".tags")


def _endings(place: Path) -> tuple[Counter[str], list[str], bool]:
    """(files by ending, sub-folders, whether all were looked at)."""
    endings: Counter[str] = Counter()
    seen = 0
    folders = sorted(entry.name for entry in os.scandir(place) if entry.is_dir())
    for _, _, files in os.walk(place):
        for name in files:
            endings[os.path.splitext(name)[1].lower()] += 1  # noqa: PTH122 - no Path object per image
        seen += len(files)
        if seen > _MOST:
            return endings, folders, False
    return endings, folders, True


def _archives(place: Path, endings: Counter[str]) -> FoundImages:
    if endings[".parquet"]:
        return FoundImages({"type": "parquet", "files": str(place)}, None, f"{endings['.parquet']:,} parquet files")
    if endings[".tar"]:
        return FoundImages({"type": "webdataset", "tars": str(place)}, None, f"{endings['.tar']:,} tars")
    kinds = ", ".join(sorted(ending.removeprefix(".") for ending in EXTENSIONS))
    raise UserError(f"{place}: holds no images ({kinds}), parquet files or tars")

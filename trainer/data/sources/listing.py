"""All kinds of sources under one roof: their names, and the stream of what they hold."""

import glob
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from trainer.config.sections.data.sources import (
    FolderSource,
    HfSource,
    KohyaJsonSource,
    LatentTarsSource,
    ParquetSource,
    Source,
    WebdatasetSource,
)
from trainer.data.sources.folder import list_folder
from trainer.data.sources.hf import list_hf
from trainer.data.sources.kohya import list_kohya_json
from trainer.data.sources.latent_tars import list_latent_tars
from trainer.data.sources.parquet import list_parquet
from trainer.data.sources.sidecars import Sidecars, sidecars_of
from trainer.data.sources.source import SourceItem
from trainer.data.sources.webdataset import list_webdataset
from trainer.guards import DEFAULT_LIMITS, Limits


def source_names(sources: tuple[Source, ...]) -> tuple[str, ...]:
    """The prefix of each source's keys: its `name`, or its folder's or file's; a later one of the same gets `~2`, ...

    Adding a source at the end leaves the names of the others as they are.
    """
    seen: Counter[str] = Counter(source.name for source in sources if source.name is not None)
    names = []
    for source in sources:
        name = source.name or _main_name(source)
        if source.name is None:
            seen[name] += 1
        names.append(name if source.name or seen[name] == 1 else f"{name}~{seen[name]}")
    return tuple(names)


def list_source(
    source: Source,
    name: str,
    ignored: Counter[str],
    scratch: Path,
    limits: Limits = DEFAULT_LIMITS,
) -> Iterator[SourceItem]:
    """Every item of a source, as a stream, in any order.

    Args:
        ignored: files that are passed over are counted here, by kind.
        scratch: a folder for temporary files.

    Raises:
        UserError: the source as a whole cannot be read. What is wrong with one item is its `problem`.
    """
    if isinstance(source, FolderSource):
        return list_folder(source, name, ignored, limits)
    if isinstance(source, KohyaJsonSource):
        return list_kohya_json(source, name, ignored, scratch, limits)
    if isinstance(source, WebdatasetSource):
        return list_webdataset(source, name, ignored, limits)
    if isinstance(source, ParquetSource):
        return list_parquet(source, name, ignored, limits)
    if isinstance(source, HfSource):
        return list_hf(source, name, ignored, limits)
    return list_latent_tars(source, name, ignored, scratch, limits)


def sidecars_by_source(sources: tuple[Source, ...]) -> dict[str, Sidecars]:
    """How the files beside images are read, by the name of each source that has more than a text beside each image."""
    named = zip(source_names(sources), sources, strict=True)
    found = {name: sidecars_of(source) for name, source in named if isinstance(source, FolderSource)}
    return {name: sidecars for name, sidecars in found.items() if not sidecars.are_plain}


def main_path(source: Source) -> Path:
    """The path by which a user knows the source; for one of the hub, its name."""
    if isinstance(source, LatentTarsSource):
        return source.metadata
    if isinstance(source, WebdatasetSource):
        return source.tars
    return source.files if isinstance(source, ParquetSource) else Path(source.path)


def is_there(place: Path) -> bool:
    """Whether a file or folder, or anything that fits a pattern, is there."""
    return bool(glob.glob(str(place))) if glob.has_magic(str(place)) else place.exists()  # noqa: PTH207


def _main_name(source: Source) -> str:
    path = main_path(source) if isinstance(source, HfSource) else main_path(source).absolute()
    if isinstance(source, KohyaJsonSource | LatentTarsSource):
        return path.stem
    if glob.has_magic(path.name):
        return path.parent.name
    return path.resolve().name if isinstance(source, FolderSource) else path.name

"""Rules between the keys of `data.sources`."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, full_path, is_given
from trainer.config.schema import Config
from trainer.config.sections.data.sources import (
    FolderSource,
    KohyaJsonSource,
    LatentTarsSource,
    ParquetSource,
    Source,
    WebdatasetSource,
)


def source_rules(config: Config) -> Iterator[Problem]:
    """Rules of `data.sources`."""
    yield from _epoch_keys(config)
    first: dict[tuple[object, ...], int] = {}
    for i, source in enumerate(config.data.sources):
        at = f"data.sources.{i}"
        names = [name for name, _ in paths_of(source)]
        paths = [full_path(getattr(source, name)) for name in names]
        other = first.setdefault((source.type, *paths), i) if names else i
        if other != i:
            keys = (f"{at}.{names[0]}", f"data.sources.{other}.{names[0]}")
            yield clash(config, keys, "the same source twice; use `repeats` to see its images more often")
        yield from _mask_keys(config, i, source)
        if isinstance(source, FolderSource):
            yield from _files_beside(config, at, source)
        elif isinstance(source, KohyaJsonSource):
            keys = (f"{at}.latents", f"{at}.images")
            if (source.latents is None) == (source.images is None):
                yield clash(config, keys, "give one of them: the folder of the `.npz` files, or that of the images")
        if config.data.mode == "images" and (isinstance(source, LatentTarsSource) or getattr(source, "latents", None)):
            yield clash(config, (f"{at}.type", "data.mode"), "holds latents; use `mode: latents`")


def _files_beside(config: Config, at: str, source: FolderSource) -> Iterator[Problem]:
    """Keys of a folder that say what lies beside its images."""
    extensions = {"caption_extension": source.caption_extension, "tags_extension": source.tags_extension}
    for name, extension in extensions.items():
        if extension is not None and (not extension.startswith(".") or len(extension) < 2):
            example = ".txt" if name == "caption_extension" else ".tags"
            yield clash(config, (f"{at}.{name}",), f"must be a dot and an ending, such as {example}")
    for other in ("caption_extension", "weight_extension"):
        if source.tags_extension is not None and source.tags_extension == getattr(source, other):
            yield clash(config, (f"{at}.tags_extension", f"{at}.{other}"), "must be files of their own")
    if source.caption_files_hold == "tags":
        for name, used in (("caption_extension", source.holds_json), ("tags_extension", source.tags_extension)):
            if used:
                rule = "give only one of them; each says where the tags are"
                yield clash(config, (f"{at}.{name}", f"{at}.caption_files_hold"), rule)
    for name in ("caption_field", "captions_field", "tags_field", "weight_field"):
        if is_given(config, f"{at}.{name}") and not source.holds_json:
            yield clash(config, (f"{at}.{name}", f"{at}.caption_extension"), "has no effect without `.json` files")
    if source.weight_field is not None and source.weight_extension is not None:
        yield clash(config, (f"{at}.weight_field", f"{at}.weight_extension"), "give only one of them")


def _mask_keys(config: Config, i: int, source: Source) -> Iterator[Problem]:
    """Keys of a source that say where masks are, and do nothing or harm."""
    at = f"data.sources.{i}"
    needed = {"mask_suffix": "files", "mask_folder": "files", "mask_column": "column"}
    for name, value in needed.items():
        if hasattr(source, name) and is_given(config, f"{at}.{name}") and source.masks != value:
            yield clash(config, (f"{at}.{name}", f"{at}.masks"), f"has no effect without `masks: {value}`")
    if isinstance(source, FolderSource) and source.mask_folder is not None:
        if is_given(config, f"{at}.mask_suffix"):
            yield clash(config, (f"{at}.mask_suffix", f"{at}.mask_folder"), "give one of them")
        if source.masks == "files" and full_path(source.mask_folder).is_relative_to(full_path(source.path)):
            keys = (f"{at}.mask_folder", f"{at}.path")
            yield clash(config, keys, "must not lie in the source, which is searched for images")
    if isinstance(source, WebdatasetSource) and not source.mask_suffix.startswith("."):
        yield clash(config, (f"{at}.mask_suffix",), "must begin with a dot, at which the names of samples end")


def paths_of(source: Source) -> list[tuple[str, str]]:
    """The fields of a source that are paths on this host and given, each a `folder`, a `file` or `files`."""
    if isinstance(source, FolderSource):
        has_folder = source.mask_folder is not None and source.masks == "files"
        return [("path", "folder"), *([("mask_folder", "folder")] if has_folder else [])]
    if isinstance(source, KohyaJsonSource):
        folders = [("latents", "folder"), ("images", "folder")]
        return [("path", "file"), *(pair for pair in folders if getattr(source, pair[0]) is not None)]
    if isinstance(source, LatentTarsSource):
        return [("metadata", "file"), ("tars", "files")]
    if isinstance(source, WebdatasetSource):
        return [("tars", "files")]
    return [("files", "files")] if isinstance(source, ParquetSource) else []


def is_needed_to_train(config: Config, source: Source) -> bool:
    """Whether what lies in the source is read while training, and not only by `prepare`."""
    return (
        config.data.mode == "images" or isinstance(source, LatentTarsSource) or bool(getattr(source, "latents", None))
    )


def _epoch_keys(config: Config) -> Iterator[Problem]:
    """How often a source is seen, and by which name it goes."""
    sources, names = config.data.sources, {}
    for i, source in enumerate(sources):
        at = f"data.sources.{i}"
        given = [f"{at}.{name}" for name in ("weight", "per_epoch", "share") if getattr(source, name) is not None]
        if len(given) > 1:
            yield clash(config, given, "give one of them")
        if source.name is not None and (other := names.setdefault(source.name, i)) != i:
            yield clash(config, (f"{at}.name", f"data.sources.{other}.name"), "each source needs a name of its own")
    shares = [f"data.sources.{i}.share" for i, source in enumerate(sources) if source.share is not None]
    total = sum(source.share or 0.0 for source in sources)
    if shares and len(shares) == len(sources) and abs(total - 1) > 1e-6:
        yield clash(config, shares, f"the shares of all sources must add up to 1, not to {total:g}")
    elif shares and len(shares) < len(sources) and total >= 1 - 1e-6:
        yield clash(config, shares, f"must leave something for the sources without a share, but add up to {total:g}")

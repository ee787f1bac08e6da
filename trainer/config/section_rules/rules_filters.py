"""Rules between the keys of `data.filters`, and with those of the sources."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash
from trainer.config.schema import Config
from trainer.config.sections.data.sources import FolderSource, LatentTarsSource

_AT = "data.filters"
_SCORES = ("score_field", "score_column")


def filter_rules(config: Config) -> Iterator[Problem]:
    """Rules of `data.filters`."""
    filters, sources = config.data.filters, config.data.sources
    for what in ("aspect", "caption_chars", "score"):
        least, most = (getattr(filters, f"{end}_{what}") for end in ("min", "max"))
        if least is not None and most is not None and least > most:
            yield clash(config, (f"{_AT}.min_{what}", f"{_AT}.max_{what}"), "would leave out every image")
    if both := sorted({*filters.tags_include} & {*filters.tags_exclude}):
        yield clash(config, (f"{_AT}.tags_include", f"{_AT}.tags_exclude"), f"both name `{both[0]}`")
    if not any(getattr(source, name, None) is not None for source in sources for name in _SCORES):
        for name in ("min_score", "max_score"):
            if getattr(filters, name) is not None:
                rule = "has no effect; no source has a `score_field` or `score_column`"
                yield clash(config, (f"{_AT}.{name}",), rule)
    if all(isinstance(source, FolderSource) and source.caption_files_hold == "caption" for source in sources):
        for name in ("tags_include", "tags_exclude"):
            if getattr(filters, name):
                rule = "has no effect or leaves out all; if the files hold tags, write `tags`"
                yield clash(config, (f"{_AT}.{name}", "data.sources.0.caption_files_hold"), rule)
    of_latents = [isinstance(s, LatentTarsSource) or getattr(s, "latents", None) is not None for s in sources]
    if filters.near_duplicates is not None and all(of_latents):
        yield clash(config, (f"{_AT}.near_duplicates",), "has no effect on latents; it compares images")

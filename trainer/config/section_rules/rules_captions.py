"""Rules between the keys of `captions`, and what the sources hold of captions and tags."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config
from trainer.config.sections.data.sources import FolderSource
from trainer.config.wording import shown

_RANDOM = ("several", "wildcards", "shuffle_tags", "tag_dropout_rate", "dropout_rate", "dropout_every_n_epochs")
_CACHED_TEXT = "must not go together; a text that is encoded once is the same at each draw"


def caption_rules(config: Config) -> Iterator[Problem]:
    """Every rule of captions that `config` breaks."""
    captions = config.captions
    cuts = captions.shuffle_tags or captions.tag_dropout_rate > 0 or bool(captions.tag_groups)
    idle = {
        "captions.caption_probability": (captions.use == "mix", ("captions.use",), "use: mix"),
        "captions.both_order": (captions.use == "both", ("captions.use",), "use: both"),
        "captions.both_separator": (captions.use == "both", ("captions.use",), "use: both"),
        "captions.keep_tokens": (cuts, ("captions.shuffle_tags",), "shuffle_tags or tag_dropout_rate"),
        "captions.keep_tokens_separator": (cuts, ("captions.shuffle_tags",), "shuffle_tags or tag_dropout_rate"),
        "captions.tag_separator": (
            cuts or captions.secondary_separator is not None or config.objective.loss_weights.weighs_tags,
            ("captions.shuffle_tags",),
            "shuffle_tags, tag_dropout_rate, secondary_separator or weights of tags",
        ),
    }
    for key, (works, others, needed) in idle.items():
        if is_given(config, key) and not works:
            yield clash(config, (key, *others), f"has no effect without `{needed}`")
    if captions.use == "mix" and captions.caption_probability in (0.0, 1.0):
        field = "caption" if captions.caption_probability else "tags"
        yield clash(config, ("captions.caption_probability",), f"mixes nothing; write `use: {field}`")
    epochs = config.train.epochs
    if epochs is not None and captions.dropout_every_n_epochs > epochs:
        yield clash(config, ("captions.dropout_every_n_epochs", "train.epochs"), "has no effect; the run ends before")
    if config.data.cache_text:
        for key in (
            "shuffle_tags",
            "tag_dropout_rate",
            "wildcards",
            "dropout_rate",
            "dropout_every_n_epochs",
            "several",
        ):
            if is_given(config, f"captions.{key}"):
                yield clash(config, ("data.cache_text", f"captions.{key}"), _CACHED_TEXT)
        if captions.use == "mix":
            yield clash(config, ("data.cache_text", "captions.use"), _CACHED_TEXT)
        for i in range(len(captions.tag_groups)):
            for name in ("dropout", "take"):
                if is_given(config, f"captions.tag_groups.{i}.{name}"):
                    yield clash(config, ("data.cache_text", f"captions.tag_groups.{i}.{name}"), _CACHED_TEXT)
    yield from _tag_groups(config)
    yield from _fields_of_text(config)


def _tag_groups(config: Config) -> Iterator[Problem]:
    """Groups of tags that could not be told apart, or that no tag can be in."""
    names: dict[str, int] = {}
    group_of: dict[str, int] = {}
    for i, group in enumerate(config.captions.tag_groups):
        at = f"captions.tag_groups.{i}"
        if (other := names.setdefault(group.name, i)) != i:
            yield clash(config, (f"{at}.name", f"captions.tag_groups.{other}.name"), "each group needs its own name")
        for tag in group.tags:
            if not tag.strip() or tag.strip() != tag or config.captions.tag_separator in tag:
                rule = (
                    f"{shown(tag)} can be no tag; tags are what stands between `captions.tag_separator`, without blanks"
                )
                yield clash(config, (f"{at}.tags",), rule)
            elif (other := group_of.setdefault(tag, i)) != i:
                keys = (f"{at}.tags", f"captions.tag_groups.{other}.tags")
                yield clash(config, keys, f"{shown(tag)} is in both; a tag has one place")
        if group.take is not None and group.take >= len(group.tags):
            yield clash(config, (f"{at}.take", f"{at}.tags"), "has no effect; the group has no more tags")


def _fields_of_text(config: Config) -> Iterator[Problem]:
    """What asks for captions or tags that no source can have."""
    sources = config.data.sources
    held = {field for source in sources if isinstance(source, FolderSource) for field in source.holds}
    if not all(isinstance(source, FolderSource) for source in sources):
        return
    key = "data.sources.0.caption_files_hold"
    if held == {"caption"}:
        for name in ("captions.shuffle_tags", "captions.tag_dropout_rate", "captions.tag_groups"):
            if is_given(config, name):
                yield clash(config, (name, key), "has no effect; if the files hold tags, write `tags`")
    if len(held) == 1 and config.captions.use in {"tags", "both", "mix"} - (held & {"tags"}):
        yield clash(config, ("captions.use", key), "has no effect; no source has both captions and tags")

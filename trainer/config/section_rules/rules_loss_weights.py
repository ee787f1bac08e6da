"""Rules between what the sources say of their images' weights and `objective.loss_weights`."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config
from trainer.config.sections.data.sources import FolderSource

_WEIGHTS = "objective.loss_weights"
_FIELDS = ("weight_extension", "weight_field", "weight_column")


def loss_weight_rules(config: Config) -> Iterator[Problem]:
    """Every rule of loss weights that `config` breaks."""
    yield from _sources(config)
    yield from _alike(config)
    yield from _own_weights(config)
    yield from _tags(config)


def _sources(config: Config) -> Iterator[Problem]:
    key = f"{_WEIGHTS}.prior"
    weight = config.objective.loss_weights.prior
    for i, source in enumerate(config.data.sources):
        at = f"data.sources.{i}"
        if source.prior and is_given(config, f"{at}.loss_weight"):
            yield clash(config, (f"{at}.loss_weight", f"{at}.prior"), f"give only one of them; `prior` means `{key}`")
        elif source.prior and weight == 1:
            rule = "has no effect; images of weight 1 are images like others: give another weight, or leave `prior` out"
            yield clash(config, (f"{at}.prior", key), rule)
    if is_given(config, key) and not any(source.prior for source in config.data.sources):
        yield clash(config, (key, "data.sources.0.prior"), "has no effect; no source has `prior: true`")


def _alike(config: Config) -> Iterator[Problem]:
    """One weight for all images: AdamW divides it out again."""
    sources, prior = config.data.sources, config.objective.loss_weights.prior
    if len({prior if source.prior else source.loss_weight for source in sources}) > 1:
        return
    first = "prior" if sources[0].prior else "loss_weight"
    if is_given(config, f"data.sources.0.{first}") and not (first == "prior" and prior == 1):
        keys = [f"data.sources.{i}.{first}" for i in (0, len(sources) - 1)]
        rule = "has next to no effect; all sources count the same, and AdamW divides the scale of the loss out again"
        yield clash(config, tuple(dict.fromkeys(keys)), rule)


def _own_weights(config: Config) -> Iterator[Problem]:
    sources = config.data.sources
    given = any(getattr(source, name, None) is not None for source in sources for name in _FIELDS)
    if is_given(config, f"{_WEIGHTS}.per_image") and not given:
        rule = f"has no effect; no source has a {' or '.join(f'`{name}`' for name in _FIELDS)}"
        yield clash(config, (f"{_WEIGHTS}.per_image",), rule)
    for i, source in enumerate(sources):
        if isinstance(source, FolderSource) and source.weight_extension is not None:
            key = f"data.sources.{i}.weight_extension"
            if not source.weight_extension.startswith(".") or len(source.weight_extension) < 2:
                yield clash(config, (key,), "must be a dot and an ending, such as .weight")
            elif source.weight_extension == source.caption_extension:
                yield clash(config, (key, f"data.sources.{i}.caption_extension"), "must be files of their own")


def _tags(config: Config) -> Iterator[Problem]:
    weights, at = config.objective.loss_weights, f"{_WEIGHTS}.tag_balance"
    balance = weights.tag_balance
    for name in ("min", "max"):
        if is_given(config, f"{at}.{name}") and not balance.power:
            yield clash(config, (f"{at}.{name}", f"{at}.power"), "has no effect without a `power`, such as 0.5")
    if balance.power and balance.min == balance.max:
        yield clash(config, (f"{at}.min", f"{at}.max"), "all tags would weigh the same; leave `power` out")
    sources = config.data.sources
    if all(isinstance(source, FolderSource) and "tags" not in source.holds for source in sources):
        has_file = weights.tag_file is not None and weights.tag_file.exists()  # that it is missing is told elsewhere
        for key, given in ((f"{at}.power", balance.power > 0), (f"{_WEIGHTS}.tag_file", has_file)):
            if given:
                keys = (key, "data.sources.0.caption_files_hold")
                yield clash(config, keys, "has no effect; if the files hold tags, write `tags`")

"""Rules between the fields of `ema`, and of what takes averages by name."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config
from trainer.config.sections.ema_config import LIVE
from trainer.config.spelling import nearest

_OF_KIND = {"decay": "plain", "warm_up": "plain", "length": "power"}


def ema_rules(config: Config) -> Iterator[Problem]:
    """Every rule that the averages of `config` break."""
    yield from _entries(config)
    yield from _idle(config)
    names = [LIVE, *(average.name for average in config.ema.averages)]
    for index, name in enumerate(config.ema.score):
        if name not in names:
            yield clash(config, ("ema.score", "ema.averages"), _unknown(name, names))
        elif name in config.ema.score[:index]:
            yield clash(config, ("ema.score",), f"names {name} twice")
    exported = config.checkpoint.export.weights
    if exported not in names and config.checkpoint.export.when != "never":
        yield clash(config, ("checkpoint.export.weights",), _unknown(exported, names))


def _entries(config: Config) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, average in enumerate(config.ema.averages):
        at = f"ema.averages.{index}"
        other = first.setdefault(average.name, index)
        if other != index:
            yield clash(config, (f"{at}.name", f"ema.averages.{other}.name"), "each average needs a name of its own")
        for field, kind in _OF_KIND.items():
            if average.kind != kind and is_given(config, f"{at}.{field}"):
                yield clash(config, (f"{at}.{field}", f"{at}.kind"), f"has no effect; it belongs to `kind: {kind}`")


def _idle(config: Config) -> Iterator[Problem]:
    """What has no effect without averages, without power averages, without snapshots."""
    if not config.ema.averages:
        for field in ("place", "update_every"):
            if is_given(config, f"ema.{field}"):
                yield clash(config, (f"ema.{field}", "ema.averages"), "has no effect; there is no average")
    steps = "ema.snapshots.every_steps"
    if is_given(config, steps) and not any(average.kind == "power" for average in config.ema.averages):
        yield clash(config, (steps, "ema.averages"), "has no effect; snapshots are of averages of `kind: power`")
    for field in ("keep", "dtype"):
        if is_given(config, f"ema.snapshots.{field}") and not config.ema.snapshots.every_steps:
            yield clash(config, (f"ema.snapshots.{field}", steps), "has no effect; no snapshots are kept")


def _unknown(name: str, names: list[str]) -> str:
    near = nearest(name, names)
    return f"`{name}` is no average; " + (f"did you mean `{near}`?" if near else f"there are {', '.join(names)}")

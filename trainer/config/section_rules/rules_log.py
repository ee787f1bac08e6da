"""Rules between the fields of `log`."""

from collections.abc import Iterator
from urllib.parse import urlsplit

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given, key_of
from trainer.config.schema import Config


def log_rules(config: Config) -> Iterator[Problem]:
    """Every rule that the trackers of `config` break."""
    trackers = config.log.trackers
    for index, name in enumerate(trackers):
        if name in trackers[:index]:
            yield clash(config, ("log.trackers",), f"names {name} twice")
    for name, section in (("wandb", config.log.wandb), ("mlflow", config.log.mlflow)):
        for field in type(section).model_fields:
            if name not in trackers and is_given(config, key := f"log.{name}.{field}"):
                yield clash(config, (key, "log.trackers"), f"has no effect; {name} is not among the trackers")
    if config.log.mlflow.uri and _holds_password(config.log.mlflow.uri):
        text = "log.mlflow.uri: holds a password, which would be published; put it into MLFLOW_TRACKING_PASSWORD"
        yield Problem((key_of("log.mlflow.uri"),), text)


def _holds_password(uri: str) -> bool:
    try:
        return urlsplit(uri).password is not None
    except ValueError:
        return False

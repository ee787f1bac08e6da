"""Rules between the fields of `notify`."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given, key_of
from trainer.config.schema import Config


def notify_rules(config: Config) -> Iterator[Problem]:
    """Every rule that the messages of `config` break."""
    notify = config.notify
    for index, event in enumerate(notify.on):
        if event in notify.on[:index]:
            yield clash(config, ("notify.on",), f"names {event} twice")
    is_on = notify.webhook is not None or notify.command
    if not is_on and is_given(config, "notify.on"):
        yield clash(config, ("notify.on",), "has no effect; give notify.webhook or notify.command")
    if notify.webhook is None and is_given(config, "notify.format"):
        yield clash(config, ("notify.format",), "has no effect; give notify.webhook")
    if is_on and not notify.on:
        yield Problem((key_of("notify.on"),), "notify.on: is empty, so that nothing would be sent; leave it out")
    if "samples" in notify.on and not config.samples.every_steps:
        yield clash(config, ("notify.on", "samples.every_steps"), "samples are never drawn")

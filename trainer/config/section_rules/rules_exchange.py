"""Rules between the fields of `exchange`, and with what shares the model in another way."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config

_METHOD = "exchange.method"
_OF_METHODS = {
    "error_feedback": ("int8", "int4"),
    "rank": ("powersgd",),
    "plain_steps": ("bf16", "int8", "int4", "powersgd"),
}


def exchange_rules(config: Config) -> Iterator[Problem]:
    """Every rule that the exchange of `config` breaks."""
    method = config.exchange.method
    for field, methods in _OF_METHODS.items():
        key = f"exchange.{field}"
        if method not in methods and is_given(config, key):
            belongs = ", ".join(f"`{name}`" for name in methods)
            yield clash(config, (key, _METHOD), f"has no effect; it belongs to {belongs}")
    if method == "plain":
        return
    if config.memory.strategy in ("zero2", "zero3"):
        rule = "must be `ddp` or `auto`; spread weights are exchanged by FSDP2"
        yield clash(config, (_METHOD, "memory.strategy"), rule)
    if config.launch.workers == 1:
        yield clash(config, (_METHOD, "launch.workers"), "has no effect; one worker exchanges nothing")
    if config.memory.release_gradients:
        yield clash(config, (_METHOD, "memory.release_gradients"), "must not go together; that is for one worker")

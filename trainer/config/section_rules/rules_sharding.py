"""Rules of `memory.shard_within`: where nothing is spread over workers, it has no effect."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config


def sharding_rules(config: Config) -> Iterator[Problem]:
    """Of what is known before the start; whether workers make such groups is seen there."""
    key, exchange = "memory.shard_within", config.exchange
    if not is_given(config, key):
        return
    if config.memory.strategy == "ddp":
        yield clash(config, (key, "memory.strategy"), "has no effect; with `ddp` each worker holds all of it")
    if config.launch.workers == 1:
        yield clash(config, (key, "launch.workers"), "has no effect; one worker holds all of it")
    if config.memory.release_gradients:
        yield clash(config, (key, "memory.release_gradients"), "has no effect; that is for one worker")
    for name, is_ddp in (("method", exchange.method != "plain"), ("average_every", exchange.averages_weights)):
        if is_ddp:
            yield clash(config, (key, f"exchange.{name}"), "has no effect; with that each worker holds all of it")
    if config.model.frozen_weights != "compute":
        yield clash(config, (key, "model.frozen_weights"), "has no effect; each worker has all of packed weights")

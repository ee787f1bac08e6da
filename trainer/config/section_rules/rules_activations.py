"""Rules of `memory.offload_activations` and the link that it counts with: what would have no effect."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config


def activation_rules(config: Config) -> Iterator[Problem]:
    """Of `some` and of a number; `true` moves what is kept beside recomputed blocks as well."""
    key, memory = "memory.offload_activations", config.memory
    if memory.offload_activations in ("auto", True, False) and type(memory.offload_activations) is not int:
        if is_given(config, "memory.link_gb_s"):
            yield clash(
                config, ("memory.link_gb_s", key), "has no effect; it belongs to `some`, or to a number of blocks"
            )
        return
    if memory.recompute == "all":
        yield clash(
            config, (key, "memory.recompute"), "has no effect; of recomputed blocks nothing is kept to be moved"
        )
    if memory.offload_weights is True:
        rule = "has no effect; all blocks are recomputed where their weights do not stay on the card"
        yield clash(config, (key, "memory.offload_weights"), rule)
    if memory.offload_activations == "some" and memory.recompute == "none":
        rule = "has no effect; it moves activations in place of recomputing blocks: give a number, or true"
        yield clash(config, (key, "memory.recompute"), rule)

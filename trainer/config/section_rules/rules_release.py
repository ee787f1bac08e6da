"""Rules of `memory.release_gradients`, and of what lies in the host's memory with it."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash
from trainer.config.schema import Config
from trainer.config.sections.adapter_config import trains_adapter


def release_rules(config: Config) -> Iterator[Problem]:
    """Of one worker and one pass, which are known at the start alone, if they are not said here."""
    key, train = "memory.release_gradients", config.train
    if not config.memory.release_gradients:
        if config.memory.offload_optimizer is True:
            rule = f"needs {key}: true, with which the optimizer takes its step block by block"
            yield clash(config, ("memory.offload_optimizer", key), rule)
        if config.memory.offload_weights is True:
            rule = f"needs {key}: true, with which blocks are updated one by one"
            yield clash(config, ("memory.offload_weights", key), rule)
        return
    if (train.gradient_accumulation_steps or 1) > 1:
        yield clash(
            config, (key, "train.gradient_accumulation_steps"), "gradients are added up over the passes of a step"
        )
    if train.global_batch_size is not None and train.global_batch_size != train.batch_size_per_gpu:
        keys = (key, "train.global_batch_size", "train.batch_size_per_gpu")
        yield clash(config, keys, "a step must be one pass of one worker")
    if isinstance(config.launch.workers, int) and config.launch.workers > 1:
        yield clash(config, (key, "launch.workers"), "several workers exchange gradients before they use them")
    if train.precision == "fp16":
        yield clash(config, (key, "train.precision"), "fp16 has to see all gradients before it takes a step")
    if config.memory.strategy != "auto":
        yield clash(config, (key, "memory.strategy"), "must be auto; it is for one worker")
    if config.optimizer.kind in ("prodigy", "dadapt_adam"):
        yield clash(config, (key, "optimizer.kind"), "the learning rate is found from all gradients of a step")
    if config.memory.offload_weights is True:
        yield from hosted_weight_rules(config)


def hosted_weight_rules(config: Config) -> Iterator[Problem]:
    """What keeps the weights of a run with released gradients from lying in the host's memory."""
    key, precision = "memory.offload_weights", config.train.precision
    if config.memory.offload_optimizer is False:
        rule = "must be auto or true; the optimizer's state goes to the host's memory before the weights"
        yield clash(config, ("memory.offload_optimizer", key), rule)
    if config.memory.recompute == "none":
        rule = "must be auto or all; what a block keeps for the backward pass keeps its weights on the card"
        yield clash(config, ("memory.recompute", key), rule)
    if config.train.compile != "off":
        yield clash(config, ("train.compile", key), "must be off; compiled blocks have not been tried with it")
    if precision in ("bf16", "fp16") and not trains_adapter(config.adapter):
        rule = "must be bf16_stochastic, bf16_kahan or fp32; autocast holds a copy of every weight on the card"
        yield clash(config, ("train.precision", key), rule)
    if config.ema.averages:
        rule = "must be empty; averages are made where the weights are, and the CPU would take longer than the step"
        yield clash(config, ("ema.averages", key), rule)
    if config.model.frozen_weights != "compute":
        rule = "must be compute; packed weights stay on the card"
        yield clash(config, ("model.frozen_weights", key), rule)

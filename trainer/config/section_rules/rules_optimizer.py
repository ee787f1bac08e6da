"""Rules between the fields of `optimizer`, and of what does not go with a kind."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config
from trainer.config.sections.optimizer_config import FINDS_LR, KIND_DEFAULTS, OptimizerConfig

_KIND = "optimizer.kind"
_OF_ALL = ("kind", "lr", "decay_norms_and_biases", "compile")


def optimizer_rules(config: Config) -> Iterator[Problem]:
    """Every rule that the optimizer of `config` breaks."""
    kind = config.optimizer.kind
    for name in OptimizerConfig.model_fields:
        key = f"optimizer.{name}"
        if name not in _OF_ALL and name not in KIND_DEFAULTS[kind] and is_given(config, key):
            kinds = [f"`{other}`" for other, numbers in KIND_DEFAULTS.items() if name in numbers]
            yield clash(config, (key, _KIND), f"has no effect; it belongs to {', '.join(kinds)}")
    yield from _compile(config)
    if kind in FINDS_LR:
        yield from _found_lr(config)
    if kind == "schedule_free_adamw":
        yield from _schedule_free(config)


def _compile(config: Config) -> Iterator[Problem]:
    kind, key = config.optimizer.kind, "optimizer.compile"
    if not is_given(config, key):
        return
    if kind == "adamw" and not config.train.precision.startswith("bf16_"):
        yield clash(config, (key, _KIND, "train.precision"), "has no effect; PyTorch's own AdamW is fused")
    elif kind not in ("adamw", "adamw_8bit"):
        yield clash(config, (key, _KIND), "has no effect; only `adamw` and `adamw_8bit` are compiled")


def _found_lr(config: Config) -> Iterator[Problem]:
    lr = config.optimizer.lr
    if not 0.1 <= lr <= 10:
        rule = "must be about 1 (0.1 to 10); this kind finds the learning rate, and takes it times this"
        yield clash(config, ("optimizer.lr", _KIND), rule)
    for name in type(config.trainable).model_fields:
        part, key = getattr(config.trainable, name), f"trainable.{name}.lr"
        if getattr(part, "train", False) and getattr(part, "lr", None) not in (None, lr):
            yield clash(config, (key, _KIND), "must be left out; this kind finds one learning rate for all weights")
        for key in (f"trainable.{name}.lr_scale", f"trainable.{name}.layer_decay"):
            if is_given(config, key):
                yield clash(config, (key, _KIND), "must be left out; this kind finds one learning rate for all weights")
    if config.adapter.text_encoder_lr not in (None, lr):
        rule = "must be left out; this kind finds one learning rate for all weights"
        yield clash(config, ("adapter.text_encoder_lr", _KIND), rule)


def _schedule_free(config: Config) -> Iterator[Problem]:
    if config.lr_schedule.kind != "constant":
        rule = "must be `constant`, with a warm-up if you like; an average of the weights takes the schedule's place"
        yield clash(config, ("lr_schedule.kind", _KIND), rule)
    if config.ema.averages:
        rule = "must not go together; the weights that are validated, drawn and exported are an average already"
        yield clash(config, ("ema.averages", _KIND), rule)
    if config.optimizer.settings()["betas"][0] == 0:
        yield clash(config, ("optimizer.betas", _KIND), "the first must be above 0; it is the average's share")

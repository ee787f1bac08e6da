"""Rules between the fields of `adapter`, and of what does not go together with one."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config, TrainableConfig
from trainer.config.sections.adapter_config import only_additions_train, trains_adapter

_WITH_CONVOLUTIONS = ("locon", "loha", "lokr", "dora")
_WITH_DROPOUT = ("lora", "locon", "dora")
_COMPILED = ("lora", "locon", "dora")
_NOT_IN_BF16 = {
    "dora": "magnitudes of `dora` that are held in bf16 would start up to 0.4 % off the model's own",
    "oft": "rotations of `oft` are solved for, which has no bf16",
}


def adapter_rules(config: Config) -> Iterator[Problem]:
    """Every rule that the adapter of `config` breaks."""
    adapter, kind = config.adapter, "adapter.kind"
    given = [name for name in type(adapter).model_fields if name != "kind" and is_given(config, f"adapter.{name}")]
    if not trains_adapter(adapter):
        for name in given:
            yield clash(config, (f"adapter.{name}", kind), "has no effect; name a kind, such as `lora`")
        return
    rules = {
        "conv_rank": (_WITH_CONVOLUTIONS, "has no effect; convolutions are changed by locon, loha, lokr and dora"),
        "conv_alpha": (_WITH_CONVOLUTIONS, "has no effect; convolutions are changed by locon, loha, lokr and dora"),
        "dropout": (_WITH_DROPOUT, "is for lora, locon and dora"),
        "lokr_factor": (("lokr",), "has no effect; it belongs to lokr"),
        "alpha": ((*_WITH_CONVOLUTIONS, "lora"), "has no effect; a rotation has no scale"),
        "rank_stabilized": ((*_WITH_CONVOLUTIONS, "lora"), "has no effect; a rotation has no scale"),
    }
    for name in given:
        if name in rules and adapter.kind not in rules[name][0]:
            yield clash(config, (f"adapter.{name}", kind), rules[name][1])
    if "conv_alpha" in given and adapter.kind in _WITH_CONVOLUTIONS[1:] and adapter.conv_rank is None:
        yield clash(config, ("adapter.conv_alpha", "adapter.conv_rank"), "has no effect; give `conv_rank` as well")
    if "text_encoder_lr" in given and not adapter.text_encoders:
        yield clash(config, ("adapter.text_encoder_lr", "adapter.text_encoders"), "has no effect; they do not train")
    yield from _beside(config)


def frozen_weight_rules(config: Config) -> Iterator[Problem]:
    """Every rule that `model.frozen_weights` breaks."""
    held = "model.frozen_weights"
    if config.model.frozen_weights == "compute":
        return
    if not only_additions_train(config.trainable, config.adapter):
        rule = "must be compute; weights that train are not held in fewer bits. Name a kind of adapter, such as `lora`"
        yield clash(config, (held, "adapter.kind"), rule)
        return
    if config.train.compile != "off":
        yield clash(config, ("train.compile", held), "must be off; compiled blocks have not been tried with it")
    if config.memory.strategy in ("zero2", "zero3") and trains_adapter(config.adapter):
        rule = "must be auto or ddp; packed weights are no parameters that workers could share, so each has all of them"
        yield clash(config, ("memory.strategy", held), rule)


def _beside(config: Config) -> Iterator[Problem]:
    """What does not go together with an adapter."""
    kind = "adapter.kind"
    for part in TrainableConfig.model_fields:
        holder = getattr(config.trainable, part)
        for name in getattr(type(holder), "model_fields", ()):
            if is_given(config, f"trainable.{part}.{name}") and (part, name) != ("unet", "lr"):
                rule = "has no effect; with an adapter nothing else trains, and `adapter.targets` says where it is"
                yield clash(config, (f"trainable.{part}.{name}", kind), rule)
    if config.train.precision.startswith("bf16_") and config.adapter.kind in _NOT_IN_BF16:
        rule = f"must be bf16, fp16 or fp32; {_NOT_IN_BF16[config.adapter.kind]}"
        yield clash(config, ("train.precision", kind), rule)
    if config.train.compile != "off" and config.adapter.kind not in _COMPILED:
        rule = "must be off; of adapters, lora, locon and dora are compiled, and layers of the others in small pieces"
        yield clash(config, ("train.compile", kind), rule)
    elif config.train.compile != "off" and config.adapter.dropout:
        rule = "must be off; blocks that are alike share compiled code, and would leave out the same elements"
        yield clash(config, ("train.compile", "adapter.dropout"), rule)
    if config.ema.snapshots.every_steps:
        yield clash(
            config, ("ema.snapshots.every_steps", kind), "must be 0; only checkpoints hold averages of adapters"
        )
    if config.adapter.text_encoders and config.data.cache_text:
        keys = ("data.cache_text", "adapter.text_encoders")
        yield clash(config, keys, "must not go together; the text encoders' outputs change")
    if config.adapter.text_encoders and is_given(config, "model.text_encoder_precision"):
        keys = ("model.text_encoder_precision", "adapter.text_encoders")
        yield clash(config, keys, "has no effect; with an adapter on them, both are held in `train.precision`")

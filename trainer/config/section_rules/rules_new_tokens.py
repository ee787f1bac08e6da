"""Rules of `new_tokens`, and of what does not go together with them."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config
from trainer.config.sections.adapter_config import trains_adapter
from trainer.config.sections.optimizer_config import FINDS_LR

_AT = "new_tokens.tokens"


def new_token_rules(config: Config) -> Iterator[Problem]:
    """Every rule that the new tokens of `config` break."""
    tokens = config.new_tokens.tokens
    if not tokens:
        for name in ("lr", "weight_decay"):
            if is_given(config, f"new_tokens.{name}"):
                yield clash(config, (f"new_tokens.{name}", _AT), "has no effect; there are none")
        return
    seen: dict[str, str] = {}
    for i, each in enumerate(tokens):
        key = f"{_AT}.{i}.token"
        if not each.token.isprintable() or any(char.isspace() or char == "," for char in each.token):
            yield clash(config, (key,), "must be one word, without spaces, commas and invisible characters")
        if seen.setdefault(each.token.casefold(), key) != key:
            yield clash(config, (seen[each.token.casefold()], key), "the same word twice; upper and lower case are one")
        if each.initial is not None and each.file is not None:
            yield clash(config, (f"{_AT}.{i}.initial", f"{_AT}.{i}.file"), "give only one of them")
    if config.optimizer.kind in FINDS_LR and is_given(config, "new_tokens.lr"):
        keys = ("new_tokens.lr", "optimizer.kind")
        yield clash(config, keys, "one learning rate is found for all weights; leave it out")
    if config.data.cache_text:
        yield clash(config, ("data.cache_text", _AT), "must not go together; the text encoders' outputs change")
    if is_given(config, "model.text_encoder_precision"):
        keys = ("model.text_encoder_precision", _AT)
        yield clash(config, keys, "has no effect; with new tokens, both are held in `train.precision`")
    if config.ema.snapshots.every_steps:
        keys = ("ema.snapshots.every_steps", _AT)
        yield clash(config, keys, "must be 0; only checkpoints hold averages of new tokens")
    if not trains_adapter(config.adapter) and not any(part.train for part in vars(config.trainable).values()):
        yield from _alone(config)


def _alone(config: Config) -> Iterator[Problem]:
    """Where nothing else trains, the model is held once, in the precision of the passes."""
    if config.train.precision.startswith("bf16_"):
        rule = "must be bf16, fp16 or fp32; new tokens are fp32, and the frozen weights are bf16 with `bf16`"
        yield clash(config, ("train.precision", _AT), rule)
    if config.memory.strategy in ("zero2", "zero3"):
        yield clash(config, ("memory.strategy", _AT), "must be auto or ddp; nothing that trains is worth spreading")

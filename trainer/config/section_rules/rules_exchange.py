"""Rules between the fields of `exchange`, and with what shares the model in another way."""

from collections.abc import Iterator

from trainer.config.fields import Problem
from trainer.config.rule_parts import clash, is_given
from trainer.config.schema import Config

_METHOD = "exchange.method"
_EVERY = "exchange.average_every"
_BUCKET = "exchange.bucket_mib"
_OF_METHODS = {
    "error_feedback": ("int8", "int4"),
    "rank": ("powersgd",),
    "plain_steps": ("bf16", "int8", "int4", "powersgd"),
}
_OF_AVERAGES = ("outer_lr", "outer_momentum", "outer_place", "fragments", "overlap_steps", "own_share")


def exchange_rules(config: Config) -> Iterator[Problem]:
    """Every rule that the exchange of `config` breaks."""
    method = config.exchange.method
    for field, methods in _OF_METHODS.items():
        key = f"exchange.{field}"
        if method not in methods and is_given(config, key):
            belongs = ", ".join(f"`{name}`" for name in methods)
            yield clash(config, (key, _METHOD), f"has no effect; it belongs to {belongs}")
    yield from _average_rules(config)
    if config.exchange.averages_weights and config.exchange.wished_bucket_mib:
        yield clash(
            config, (_BUCKET, _EVERY), "has no effect; buckets are for gradients that are averaged in each step"
        )
    if method != "plain" or config.exchange.averages_weights:
        key = _METHOD if method != "plain" else _EVERY
    elif config.exchange.wished_bucket_mib:
        key = _BUCKET
    else:
        return
    if config.memory.strategy in ("zero2", "zero3"):
        rule = "must be `ddp` or `auto`; spread weights are exchanged by FSDP2"
        yield clash(config, (key, "memory.strategy"), rule)
    if config.launch.workers == 1:
        yield clash(config, (key, "launch.workers"), "has no effect; one worker exchanges nothing")
    if config.memory.release_gradients:
        yield clash(config, (key, "memory.release_gradients"), "must not go together; that is for one worker")


def _average_rules(config: Config) -> Iterator[Problem]:
    """Of weights that are averaged now and then."""
    exchange = config.exchange
    if not exchange.averages_weights:
        for field in _OF_AVERAGES:
            if is_given(config, f"exchange.{field}"):
                yield clash(
                    config, (f"exchange.{field}", _EVERY), "has no effect; it belongs to `average_every` above 1"
                )
        return
    if exchange.fragments > exchange.average_every:
        yield clash(config, ("exchange.fragments", _EVERY), "must not be more; each has its own step among them")
    if exchange.overlap_steps >= exchange.average_every:
        yield clash(config, ("exchange.overlap_steps", _EVERY), "must be less; the next average begins then")
    if config.optimizer.kind == "schedule_free_adamw":
        yield clash(config, (_EVERY, "optimizer.kind"), "must be another; that averages weights in a way of its own")
    if config.train.precision == "bf16_kahan":
        yield clash(config, (_EVERY, "train.precision"), "must be another; what Kahan summation keeps is no weight")
    every = config.ema.update_every
    if config.ema.averages and every > 1 and every % exchange.average_every:
        yield clash(config, ("ema.update_every", _EVERY), "must be 1 or a multiple; common weights change only then")
    for name in ("unet", "text_encoder_1", "text_encoder_2"):
        for moment in ("start_at", "stop_at"):
            part = getattr(config.trainable, name)
            if getattr(part, moment, None) is not None:
                yield clash(config, (f"trainable.{name}.{moment}", _EVERY), "must not go together")

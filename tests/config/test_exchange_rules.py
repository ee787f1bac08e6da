"""The section `exchange`: what would do nothing, or does not go with how the model is shared, is refused in a line."""

from collections.abc import Callable

import pytest

from trainer.config.load import to_yaml
from trainer.config.schema import Config

from .conftest import RIGHT


def test_one_key_turns_it_on(load: Callable[..., Config]) -> None:
    assert load().exchange.method == "plain" and not load().exchange.keeps_errors
    config = load(RIGHT, ["exchange.method=int8"])
    assert config.exchange.keeps_errors and load(to_yaml(config)).exchange == config.exchange
    assert not load(RIGHT + "exchange: {method: int4, error_feedback: no}").exchange.keeps_errors
    assert load(RIGHT + "exchange: {method: powersgd, rank: 8, plain_steps: 50}\nmemory: {strategy: ddp}")


def test_averages_of_weights(load: Callable[..., Config]) -> None:
    assert not load().exchange.averages_weights
    config = load(RIGHT, ["exchange.average_every=8"])
    assert config.exchange.averages_weights and load(to_yaml(config)).exchange == config.exchange
    assert (config.exchange.outer_lr, config.exchange.outer_momentum, config.exchange.kept_share) == (1.0, 0.0, 0.0)
    streamed = load(RIGHT + "exchange: {average_every: 32, fragments: 8, overlap_steps: 4}").exchange
    assert streamed.kept_share == 0.5 and streamed.model_copy(update={"own_share": 0.0}).kept_share == 0.0
    assert load(RIGHT + "exchange: {average_every: 8, method: int4, error_feedback: no}\nmemory: {strategy: ddp}")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("exchange: {method: int2}", "exchange.method = int2: must be one of plain, bf16, int8, int4, powersgd"),
        ("exchange: {rank: 0}", "exchange.rank = 0: must be at least 1"),
        (
            "exchange: {method: bf16, error_feedback: no}",
            "exchange.error_feedback = false with exchange.method = bf16: has no effect; it belongs to `int8`, `int4`",
        ),
        ("exchange: {method: int8, rank: 8}", "has no effect; it belongs to `powersgd`"),
        ("exchange: {plain_steps: 8}", "has no effect; it belongs to `bf16`, `int8`, `int4`, `powersgd`"),
        (
            "exchange: {method: int8}\nmemory: {strategy: zero2}",
            "exchange.method = int8 with memory.strategy = zero2: must be `ddp` or `auto`; spread weights are",
        ),
        ("exchange: {method: bf16}\nmemory: {strategy: zero3}", "with memory.strategy = zero3: must be `ddp`"),
        ("exchange: {method: int8}\nlaunch: {workers: 1}", "has no effect; one worker exchanges nothing"),
        ("exchange: {method: int8}\nmemory: {release_gradients: yes}", "must not go together; that is for one worker"),
        (
            "exchange: {outer_lr: 0.5}",
            "exchange.outer_lr = 0.5 with exchange.average_every = 1 (the default): has no effect; it belongs to",
        ),
        ("exchange: {average_every: 0}", "exchange.average_every = 0: must be at least 1"),
        ("exchange: {bucket_mib: 0}", "exchange.bucket_mib = 0: must be"),
        (
            "exchange: {bucket_mib: 16, average_every: 8}",
            "exchange.bucket_mib = 16.0 with exchange.average_every = 8: has",
        ),
        (
            "exchange: {bucket_mib: 16}\nmemory: {strategy: zero2}",
            "exchange.bucket_mib = 16.0 with memory.strategy = zero2: must be `ddp` or `auto`",
        ),
        (
            "exchange: {bucket_mib: 16}\nlaunch: {workers: 1}",
            "exchange.bucket_mib = 16.0 with launch.workers = 1: has no effect; one worker",
        ),
        ("exchange: {average_every: 8, outer_momentum: 1.0}", "exchange.outer_momentum = 1.0: must be less than 1"),
        (
            "exchange: {average_every: 8}\nmemory: {strategy: zero2}",
            "exchange.average_every = 8 with memory.strategy = zero2: must be `ddp` or `auto`; spread weights are",
        ),
        ("exchange: {average_every: 8}\nlaunch: {workers: 1}", "has no effect; one worker exchanges nothing"),
        ("exchange: {average_every: 8}\nmemory: {release_gradients: yes}", "must not go together; that is for one"),
        ("exchange: {average_every: 2, fragments: 3}", "must not be more; each has its own step among them"),
        ("exchange: {average_every: 2, overlap_steps: 2}", "must be less; the next average begins then"),
        (
            "exchange: {average_every: 8}\nema: {averages: [{kind: plain}], update_every: 4}",
            "ema.update_every = 4 with exchange.average_every = 8: must be 1 or a multiple",
        ),
    ],
)
def test_mistakes(mistakes: Callable[..., tuple[str, ...]], more: str, said: str) -> None:
    (line,) = mistakes(RIGHT + more)
    assert said in line, line

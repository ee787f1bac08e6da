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
    ],
)
def test_mistakes(mistakes: Callable[..., tuple[str, ...]], more: str, said: str) -> None:
    (line,) = mistakes(RIGHT + more)
    assert said in line, line

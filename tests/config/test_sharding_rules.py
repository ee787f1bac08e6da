"""`memory.shard_within`: what would do nothing, or does not come out even, is refused in a line."""

from collections.abc import Callable

import pytest

from trainer.config.load import to_yaml
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.parallel.shard_groups import workers_within

from .conftest import RIGHT


def test_what_it_may_be(load: Callable[..., Config]) -> None:
    assert load().memory.shard_within == "all"
    for value, wanted in (("host", "host"), ("4", 4), ("all", "all")):
        config = load(RIGHT, [f"memory.shard_within={value}"])
        assert config.memory.shard_within == wanted and load(to_yaml(config)).memory == config.memory
    assert load(RIGHT + "memory: {strategy: ddp, shard_within: all}")  # the default, and so written out in full


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("memory: {shard_within: 1}", "memory.shard_within = 1: must be "),
        ("memory: {shard_within: hosts}", "memory.shard_within = hosts: must be "),
        (
            "memory: {shard_within: host, strategy: ddp}",
            "memory.shard_within = host with memory.strategy = ddp: has no effect; with `ddp` each worker holds all",
        ),
        ("memory: {shard_within: 2}\nlaunch: {workers: 1}", "has no effect; one worker holds all of it"),
        ("memory: {shard_within: 2}\nexchange: {method: int8}", "has no effect; with that each worker holds all"),
        ("memory: {shard_within: 2}\nexchange: {average_every: 8}", "has no effect; with that each worker holds all"),
        ("memory: {shard_within: 2, release_gradients: yes}", "has no effect; that is for one worker"),
    ],
)
def test_mistakes(mistakes: Callable[..., tuple[str, ...]], more: str, said: str) -> None:
    (line,) = mistakes(RIGHT + more)
    assert said in line, line


@pytest.mark.parametrize(
    ("wish", "workers", "here", "within"),
    [
        ("all", 8, 4, 8),
        ("host", 8, 4, 4),
        ("host", 4, 4, 4),
        (2, 8, 4, 2),
        (8, 8, 4, 8),
        ("host", 1, 1, 1),
        (4, 1, 1, 1),
    ],
)
def test_groups(wish: str | int, workers: int, here: int, within: int) -> None:
    assert workers_within(wish, workers, here) == within


@pytest.mark.parametrize(
    ("wish", "workers", "here", "said"),
    [
        (
            3,
            8,
            4,
            "memory.shard_within = 3: the run's 8 workers do not make groups of 3; give a number that divides them",
        ),
        (16, 8, 4, "the run's 8 workers do not make groups of 16"),
        (
            "host",
            7,
            4,
            "the run's 7 workers, 4 of them on this host do not make groups of 4; start as many on each host",
        ),
        ("host", 2, 1, "a host has one worker, with whom nobody shares"),
    ],
)
def test_groups_that_do_not_come_out_even(wish: str | int, workers: int, here: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        workers_within(wish, workers, here)

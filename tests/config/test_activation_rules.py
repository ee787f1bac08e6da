"""`memory.offload_activations`: what would do nothing is refused in a line."""

from collections.abc import Callable

import pytest

from trainer.config.load import to_yaml
from trainer.config.schema import Config

from .conftest import RIGHT


def test_what_a_link_is_for(load: Callable[..., Config]) -> None:
    for value in ("some", "12"):
        overrides = [f"memory.offload_activations={value}", "memory.link_gb_s=24"]
        assert load(RIGHT, overrides).memory.link_gb_s == 24


def test_what_it_may_be(load: Callable[..., Config]) -> None:
    assert load().memory.offload_activations == "auto"
    for value, wanted in (("some", "some"), ("12", 12), ("1", 1), ("true", True), ("false", False)):
        config = load(RIGHT, [f"memory.offload_activations={value}"])
        found = config.memory.offload_activations
        assert found == wanted and type(found) is type(wanted) and load(to_yaml(config)).memory == config.memory


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("memory: {offload_activations: 0}", "memory.offload_activations = 0: must be "),
        ("memory: {offload_activations: sum}", "must be "),
        (
            "memory: {offload_activations: 4, recompute: all}",
            "memory.offload_activations = 4 with memory.recompute = all: has no effect; of recomputed blocks nothing",
        ),
        ("memory: {offload_activations: some, recompute: all}", "has no effect; of recomputed blocks nothing is kept"),
        (
            "memory: {link_gb_s: 24}",
            "memory.link_gb_s = 24.0 with memory.offload_activations = auto (the default): has no",
        ),
        ("memory: {offload_activations: some, recompute: none}", "has no effect; it moves activations in place of"),
    ],
)
def test_mistakes(mistakes: Callable[..., tuple[str, ...]], more: str, said: str) -> None:
    (line,) = mistakes(RIGHT + more)
    assert said in line, line

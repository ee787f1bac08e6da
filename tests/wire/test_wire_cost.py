"""Bytes of an exchange by arithmetic, against sums by hand."""

import pytest

from trainer.config.sections.exchange_config import ExchangeConfig, ExchangeMethod
from trainer.wire.wire_cost import (
    average_scratch_bytes,
    kept_bytes,
    outer_bytes,
    saved_bytes,
    saved_of_average,
    scratch_bytes,
    sent_bytes,
    told,
    travelling_bytes,
)

SHAPES = [(320, 640), (320,), (64, 32, 3, 3), (4, 4)]
WEIGHTS = 320 * 640 + 320 + 64 * 32 * 9 + 16
LARGE = 320 * 640 + 64 * 32 * 9


def exchange(method: ExchangeMethod, **more: float) -> ExchangeConfig:
    return ExchangeConfig.model_validate({"method": method, **more})


@pytest.mark.parametrize(
    ("method", "content"),
    [
        ("plain", 2 * WEIGHTS),
        ("bf16", 512 * (800 + 2 + 72 + 1)),
        ("int8", 258 * (800 + 72) + 4 * (320 + 16)),
        ("int4", 66 * (1600 + 144) + 4 * (320 + 16)),
        ("powersgd", 4 * (4 * (320 + 640) + 4 * (64 + 288) + 320 + 16)),
    ],
)
def test_what_is_sent(method: ExchangeMethod, content: int) -> None:
    assert sent_bytes(exchange(method), SHAPES, 4, 2) == 2 * content * 3 // 4
    assert sent_bytes(exchange(method), SHAPES, 1, 2) == 0


def test_what_is_kept_and_saved() -> None:
    for method in ("plain", "bf16"):
        assert kept_bytes(exchange(method), SHAPES) == saved_bytes(exchange(method), SHAPES, 4) == 0
    assert kept_bytes(exchange("int8"), SHAPES) == 2 * LARGE
    assert saved_bytes(exchange("int8"), SHAPES, 4) == 8 * LARGE
    assert kept_bytes(exchange("int4", error_feedback=False), SHAPES) == 0
    bases = 4 * 2 * (640 + 288)
    assert kept_bytes(exchange("powersgd", rank=2), SHAPES) == 2 * LARGE + bases
    assert saved_bytes(exchange("powersgd", rank=2), SHAPES, 3) == 6 * LARGE + bases


def test_a_moments_memory_is_less_than_what_a_bucket_holds_in_fp32_twice_over() -> None:
    shapes = [(1280, 1280)] * 20
    for method in ("bf16", "int8", "int4", "powersgd"):
        assert 0 < scratch_bytes(exchange(method), shapes, 4) < 2.1 * 4 * 20 * 1280**2 + 100 * 2**20
    assert scratch_bytes(exchange("plain"), shapes, 4) == 0


def test_averages_every_few_steps() -> None:
    """By hand: differences are fp32 with `plain`, whatever the weights are."""
    every = exchange("plain", average_every=8)
    assert sent_bytes(every, SHAPES, 4, 2) == sent_bytes(every, SHAPES, 4, 4) == 2 * 4 * WEIGHTS * 3 // 4 // 8
    narrow = exchange("int8", average_every=8)
    assert sent_bytes(narrow, SHAPES, 4, 2) == sent_bytes(exchange("int8"), SHAPES, 4, 2) // 8
    assert outer_bytes(SHAPES) == 8 * WEIGHTS
    # Momentum, common weights where weights are bf16, all workers' weights, and the moments of all but the first.
    assert saved_of_average(SHAPES, 4, 4, 8.0) == WEIGHTS * (4 + 4 * 4 + 3 * 8)
    assert saved_of_average(SHAPES, 4, 2, 2.0) == WEIGHTS * (4 + 4 + 4 * 2 + 3 * 2)
    named = {str(index): (1 << 20,) for index in range(64)}
    assert travelling_bytes(every, named) == 0
    late = exchange("plain", average_every=8, fragments=4, overlap_steps=2)
    assert travelling_bytes(late, named) == 4 * (16 << 20)  # a fragment, which arrives when the next one begins
    assert travelling_bytes(late.model_copy(update={"overlap_steps": 3}), named) == 2 * 4 * (16 << 20)
    assert average_scratch_bytes(every, named, 4) == 2 * 4 * (16 << 20)


def test_lines() -> None:
    big = [(1280, 5120)] * 400
    assert told(exchange("plain"), big, 4, 2) == "gradients travel in 16 bits: each worker sends 7.86 GB a step"
    line = told(exchange("int8"), big, 4, 2)
    assert line == "gradients travel in 8 bits, with error feedback: each worker sends 3.96 GB a step, 1.98 times less"
    line = told(exchange("plain", average_every=8), big, 4, 2)
    said = "weights are averaged every 8 steps; differences travel in 32 bits: each worker sends 1.97 GB a step"
    assert line == f"{said} in the mean"
    line = told(exchange("powersgd", plain_steps=100), SHAPES, 3, 4)
    assert line.startswith("gradients travel as products of rank 4, after step 100: each worker sends 0.03 MB a step")

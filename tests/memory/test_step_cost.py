"""Seconds for which a pass waits for copies, counted by hand."""

import pytest

from trainer.memory.step_cost import waiting_s

# Six blocks of a second each, and of two in the backward pass; "a" runs first.
FORWARD = [(1.0, "leaves", block) for block in "abcdef"]
BACKWARD = [(0.0 if block == "f" else 2.0, "enters", block) for block in "fedcba"]
EVENTS = [*FORWARD, *BACKWARD, (2.0, "", "")]


@pytest.mark.parametrize(
    ("moved", "rates", "again", "seconds"),
    [
        ("", (1.0, 1.0), "", 0.0),
        ("abc", (1e9, 1e9), "", 0.0),
        ("abcdef", (1.0, 1.0), "", 1.0),  # each as fast as a block computes; the last two in flight end a second late
        ("abcdef", (0.5, 1.0), "", 7.0),  # twice as slow: "f" has left after 1 + 12 seconds instead of 6
        ("ace", (0.5, 1e9), "", 0.0),  # two seconds of computation for each; "e" has left at 7, before it is needed
        ("ace", (0.25, 1e9), "", 5.0),  # "e" ends at 13, and is needed at 8
        ("ace", (1e9, 0.25), "", 0.0),  # only "a" has to come back, while "c" and "b" run backward
        ("abcd", (1e9, 0.25), "", 4.0),  # "b" while "c" runs, two seconds late, and so "a" after it
        ("acd", (1e9, 1 / 6), "", 2.0),
        ("acd", (1e9, 1 / 6), "b", 1.0),  # hidden by what is computed again meanwhile
    ],
)
def test_waiting(moved: str, rates: tuple[float, float], again: str, seconds: float, patience: int = 100) -> None:
    sizes, recomputed = dict.fromkeys(moved, 1), dict.fromkeys(again, 1.0)
    assert waiting_s(EVENTS, sizes, recomputed, rates, (2, patience)) == pytest.approx(seconds, abs=1e-6)


def test_copies_that_are_overdue_are_waited_for() -> None:
    """Of "a", which takes four seconds: after two blocks more; and back, for nothing before has begun that."""
    test_waiting("a", (0.25, 1e9), "", 0.0)
    test_waiting("a", (0.25, 1e9), "", 2.0, patience=2)
    test_waiting("a", (1e9, 0.25), "", 0.0)
    test_waiting("a", (1e9, 0.25), "", 4.0, patience=2)

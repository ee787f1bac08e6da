"""A worker that computes slowly is told once, and once when it does no more."""

from random import Random

from trainer.measure.stragglers import LATEST, Stragglers


def test_a_slow_worker_is_named_once_and_forgotten_when_it_is_well() -> None:
    rng, stragglers = Random(1), Stragglers(4)

    def steps(number: int, slow: float) -> list[str]:
        lines = []
        for _ in range(number):
            lines += stragglers.note([rng.gauss(0.1, 0.01) * (slow if rank == 2 else 1.0) for rank in range(4)])
        return lines

    assert steps(LATEST * 3, 1.0) == []
    (line,) = steps(LATEST * 3, 1.5)
    assert line.startswith("worker 2 computes slowly: ") and "all wait for it" in line
    (line,) = steps(LATEST * 3, 1.0)
    assert line.startswith("worker 2 computes as fast as the others again")


def test_the_line_at_the_end() -> None:
    stragglers = Stragglers(2)
    assert stragglers.told() == ""
    for step in range(LATEST):
        stragglers.note([0.1, 0.2 if step else 0.9])
    assert stragglers.told().startswith("forward passes of a step, median/p99 in ms by worker: 100/100, 200/")

"""What an exchange holds, by the plan, against what PyTorch's own count of two real workers says."""

import pytest

from benchmarks.memory_plan import METHODS, Case, measure_all, plan

CASES = [Case("mini", "ddp", 2, passes, False, exchange=method) for method in METHODS for passes in (1, 2)]


@pytest.mark.slow
def test_the_plan_counts_what_an_exchange_holds() -> None:
    # What gloo's thread is the last to free is not seen, now and then, and counted to the end: take the smaller of two.
    measured = list(measure_all(CASES * 2, alone=False))
    assert len(measured) == 2 * len(CASES)
    for case, found in zip(CASES, map(min, measured[: len(CASES)], measured[len(CASES) :]), strict=True):
        assert plan(case).total == pytest.approx(found, rel=0.05), (case.exchange, case.accumulation)

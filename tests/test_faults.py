"""Faults on purpose: where and when they happen, and that a start after one does not meet it again."""

import pytest

from trainer.errors import UserError
from trainer.faults import planned


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch):
    for name in ("SDXL_TRAIN_RESTARTS", "SDXL_TRAIN_MEMORY_ATTEMPT"):
        monkeypatch.delenv(name, raising=False)
    return lambda text: monkeypatch.setenv("FAULT", text)


def test_without_the_variable_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FAULT", raising=False)
    assert planned("kill", 0, 1) is None


def test_a_fault_happens_at_its_place_alone(fault) -> None:
    fault("nan_gradient@1:7, loss_spike@*:20-22:1e3")
    happens = [(rank, step) for rank in range(3) for step in range(30) if planned("nan_gradient", rank, step) == ""]
    assert happens == [(1, 7)]
    happens = [(rank, step) for rank in range(2) for step in range(30) if planned("loss_spike", rank, step) == "1e3"]
    assert happens == [(rank, step) for rank in (0, 1) for step in (20, 21, 22)]
    assert planned("kill", 1, 7) is None


@pytest.mark.parametrize("variable", ["SDXL_TRAIN_RESTARTS", "SDXL_TRAIN_MEMORY_ATTEMPT"])
def test_a_start_after_a_fault_meets_only_those_that_are_always(fault, monkeypatch, variable: str) -> None:
    fault("kill@0:5,flip_bit@3:10:always,slow@0:5:always:0.5")
    assert (planned("kill", 0, 5), planned("flip_bit", 3, 10), planned("slow", 0, 5)) == ("", "", "0.5")
    monkeypatch.setenv(variable, "1")
    assert (planned("kill", 0, 5), planned("flip_bit", 3, 10), planned("slow", 0, 5)) == (None, "", "0.5")


@pytest.mark.parametrize("text", ["kill", "kill@x:5", "kill@0", "kill@0:", "kill@0:5:", "Kill@0:5", "kill@0:5;", ","])
def test_what_cannot_be_read_is_said_in_a_line(fault, text: str) -> None:
    fault(text)
    with pytest.raises(UserError, match="kind@rank:step") as error:
        planned("kill", 0, 5)
    assert len(error.value.lines) == 1

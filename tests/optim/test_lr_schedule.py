"""The learning rate against PyTorch's own schedulers and its defining points."""

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR

from trainer.config.schema import LrScheduleConfig
from trainer.optim.lr_schedule import lr_at


def rates(total_steps: int, **schedule: object) -> list[float]:
    config = LrScheduleConfig(**schedule)  # type: ignore[arg-type]
    return [lr_at(step, total_steps, 2.0, config) for step in range(total_steps)]


def torch_rates(make: type, total_steps: int, **arguments: float) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    scheduler = make(optimizer, **arguments)
    found = []
    for _ in range(total_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_constant_is_constant_after_a_linear_warm_up() -> None:
    assert rates(5) == [2.0] * 5
    assert rates(6, warmup_steps=3) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_cosine_equals_torch() -> None:
    expected = torch_rates(CosineAnnealingLR, 11, T_max=10, eta_min=0.2)
    assert rates(11, kind="cosine", final_ratio=0.1) == pytest.approx(expected)


def test_linear_equals_torch() -> None:
    expected = torch_rates(LinearLR, 11, start_factor=1.0, end_factor=0.25, total_iters=10)
    assert rates(11, kind="linear", final_ratio=0.25) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_decay_starts_at_the_peak_after_the_warm_up_and_ends_on_the_last_step(kind: str) -> None:
    found = rates(20, kind=kind, warmup_steps=5, final_ratio=0.1)
    assert max(found) == found[5] == 2.0
    assert found[-1] == pytest.approx(0.2)
    assert lr_at(50, 20, 2.0, LrScheduleConfig(kind=kind, final_ratio=0.1)) == pytest.approx(0.2)

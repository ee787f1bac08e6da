"""The loss scale: halved by an overflow, doubled after a good stretch, as GradScaler does it."""

import json
import math

import torch
from torch import nn

from trainer.optim.loss_scale import GROWTH_INTERVAL, LARGEST, SMALLEST, LossScale


def test_it_follows_torchs_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, growth_interval=GROWTH_INTERVAL)
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    ours = LossScale()
    for step in range(2 * GROWTH_INTERVAL + 10):
        overflow = step in (3, 4, 1000)
        scaler.scale(torch.zeros(())).item()  # GradScaler makes its state at first use
        parameter.grad = torch.full((2,), math.inf if overflow else 1.0)
        scaler.step(optimizer)
        scaler.update()
        ours = ours.after(finite=not overflow)
        assert ours.scale == scaler.get_scale(), step


def test_it_stays_within_bounds_and_goes_through_json() -> None:
    scale = LossScale()
    for _ in range(40):
        scale = scale.after(finite=False)
    assert scale == LossScale(SMALLEST, 0)
    for _ in range(26 * GROWTH_INTERVAL + 7):
        scale = scale.after(finite=True)
    assert scale == LossScale(LARGEST, 7)
    assert LossScale.from_json(json.loads(json.dumps(scale.to_json()))) == scale


def test_an_overflow_skips_the_step_and_fp16_gradients_stay_above_zero() -> None:
    """A gradient of 1e-9 is 0 in fp16; scaled, it arrives."""
    weight = nn.Parameter(torch.ones(()))

    def gradient_of(loss_scale: float) -> float:
        (weight.half() * torch.tensor(1e-3, dtype=torch.float16)).mul(1e-6 * loss_scale).backward()
        assert weight.grad is not None
        found, weight.grad = float(weight.grad) / loss_scale, None
        return found

    scale = LossScale(scale=2.0**36)
    assert gradient_of(1.0) == 0.0
    skipped = 0
    while not math.isfinite(found := gradient_of(scale.scale)):
        scale, skipped = scale.after(finite=False), skipped + 1
    assert skipped > 0 and abs(found / 1e-9 - 1) < 0.01

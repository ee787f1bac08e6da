"""The learning rate as a pure function of the step: nothing to save, nothing that ticks out of turn."""

import math

from trainer.config.schema import LrScheduleConfig


def lr_at(step: int, total_steps: int, peak_lr: float, schedule: LrScheduleConfig) -> float:
    """Learning rate of optimizer step `step` (counted from 0) of a run of `total_steps`.

    The warm-up rises linearly and reaches `peak_lr` at step `warmup_steps`; the decay then runs from
    there to the last step, which uses `peak_lr * final_ratio`.
    """
    if step < schedule.warmup_steps:
        return peak_lr * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.kind == "constant":
        return peak_lr
    decay_steps = max(total_steps - 1 - schedule.warmup_steps, 1)
    progress = min((step - schedule.warmup_steps) / decay_steps, 1.0)
    share = 1 - progress if schedule.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return peak_lr * (schedule.final_ratio + (1 - schedule.final_ratio) * share)

"""The arithmetic of a run in plain numbers: images per step, steps per epoch, when it ends; no torch, no numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.errors import UserError


@dataclass(frozen=True)
class RunArithmetic:
    """What follows from the batch settings and the size of the data. Made by `run_arithmetic`."""

    workers: int
    batch_size_per_gpu: int  # images in one forward and backward pass of one worker
    accumulation: int  # forward and backward passes per optimizer step
    images_per_step: int  # global batch G: the rows of one optimizer step, all of one bucket
    rows_per_bucket: tuple[int, ...]  # images of each bucket, repeats counted
    batch_factors: tuple[int, ...]  # steps and passes of each bucket hold so many times the images said above
    total_steps: int  # optimizer steps of the whole run
    checkpoint_every_steps: int | None
    checkpoint_every: str  # as a person says it; or never

    @property
    def slots_per_step(self) -> int:
        """Rows that all workers compute in one step; more than `images_per_step` where it does not divide."""
        return self.workers * self.batch_size_per_gpu * self.accumulation

    @property
    def images_per_epoch(self) -> int:
        """Images of one pass over the data, repeats counted."""
        return sum(self.rows_per_bucket)

    @property
    def filled_buckets(self) -> int:
        """Buckets that hold an image."""
        return sum(rows > 0 for rows in self.rows_per_bucket)

    @property
    def steps_per_epoch(self) -> int:
        """Sum over the buckets of ceil(rows / images of its steps): a step never mixes buckets."""
        return sum(self._steps_of_buckets())

    @property
    def epochs(self) -> float:
        """Passes over the data of the whole run."""
        return self.total_steps / self.steps_per_epoch

    @property
    def total_images(self) -> int:
        """Images seen by the whole run, padding not counted; in a broken last epoch, its expectation."""
        return round(self.total_steps * self.images_per_epoch / self.steps_per_epoch)

    @property
    def padded_share(self) -> float:
        """Share of an epoch's slots that hold padding of weight 0, from 0 to 1."""
        batches = sum(f * steps for f, steps in zip(self.batch_factors, self._steps_of_buckets(), strict=True))
        return 1 - self.images_per_epoch / (batches * self.slots_per_step)

    def time_left_s(self, step: int, seconds_per_step: float) -> float:
        """Seconds from `step` (done) to the end at this speed."""
        return max(self.total_steps - step, 0) * seconds_per_step

    def describe(self, start_step: int = 0, seconds_per_step: float | None = None) -> list[str]:
        """The lines that are printed at start; with `seconds_per_step`, also how long the run takes."""
        return [
            self._describe_step(),
            self._describe_epoch(),
            self._describe_run(start_step, seconds_per_step),
            self._describe_checkpoints(),
        ]

    def _steps_of_buckets(self) -> list[int]:
        return [
            math.ceil(rows / (self.images_per_step * factor))
            for rows, factor in zip(self.rows_per_bucket, self.batch_factors, strict=True)
        ]

    def _describe_step(self) -> str:
        usual, most = self._describe_usual_step(), max(self.batch_factors)
        return usual if most == 1 else f"{usual}; up to {most} times as many in buckets of small images"

    def _describe_usual_step(self) -> str:
        product = (
            f"{_count(self.workers, 'worker')} x {_count(self.batch_size_per_gpu, 'image')}"
            f" x {self.accumulation:,} accumulation"
        )
        if self.slots_per_step == self.images_per_step:
            return f"{product} = {_count(self.images_per_step, 'image')} per step"
        return (
            f"{product} = {self.slots_per_step:,} slots for {_count(self.images_per_step, 'image')} per step"
            f" (no multiple of {self.workers * self.batch_size_per_gpu:,}: the rest is padding)"
        )

    def _describe_epoch(self) -> str:
        line = (
            f"{_count(self.images_per_epoch, 'training image')} in {_count(self.filled_buckets, 'bucket')}"
            f" -> {_count(self.steps_per_epoch, 'step')} per epoch"
        )
        if self.padded_share == 0:
            return line
        few = self.slots_per_step == self.images_per_step and self.padded_share >= 0.05
        return f"{line} ({_percent(self.padded_share)} of slots padded{': buckets with few images' if few else ''})"

    def _describe_checkpoints(self) -> str:
        times = [f"every {self.checkpoint_every}"] if self.checkpoint_every != "never" else []
        times += [f"every {_count(self.checkpoint_every_steps, 'step')}"] if self.checkpoint_every_steps else []
        return f"checkpoints {', '.join([*times, 'at the end'])}"

    def _describe_run(self, start_step: int, seconds_per_step: float | None) -> str:
        even = self.images_per_epoch == self.steps_per_epoch * self.images_per_step and max(self.batch_factors) == 1
        exact = self.total_steps % self.steps_per_epoch == 0 or even
        epochs = f"{self.epochs:,.1f}".removesuffix(".0")
        line = (
            f"{_count(self.total_steps, 'step')} = {epochs} epoch{'' if epochs == '1' else 's'}"
            f" = {'' if exact else 'about '}{_count(self.total_images, 'image')}; ends at step {self.total_steps:,}"
        )
        if start_step > self.total_steps:
            return f"already trained to step {start_step:,}; the run ends at step {self.total_steps:,} (train.steps)"
        if start_step:
            line += f", goes on after step {start_step:,}, {_count(self.total_steps - start_step, 'step')} to go"
        if seconds_per_step is not None:
            line += f", {format_duration(self.time_left_s(start_step, seconds_per_step))} left"
        return line


def run_arithmetic(
    *,
    workers: int,
    batch_size_per_gpu: int,
    gradient_accumulation_steps: int | None,
    global_batch_size: int | None,
    rows_per_bucket: Sequence[int],
    steps: int | None,
    epochs: int | None,
    checkpoint_every_steps: int | None,
    checkpoint_every: str = "never",
    batch_factors: Sequence[int] | None = None,
) -> RunArithmetic:
    """Derives the run's numbers from the settings, as `train.*` of the configuration gives them.

    Args:
        workers: worker processes over all hosts.
        batch_size_per_gpu: images in one forward and backward pass of one worker.
        gradient_accumulation_steps: default 1, or what `global_batch_size` needs.
        global_batch_size: images per optimizer step; default workers x batch x accumulation.
        rows_per_bucket: training images of each bucket, repeats counted.
        steps, epochs: length of the run; exactly one is given.
        checkpoint_every_steps, checkpoint_every: steps and time between checkpoints, where they count.
        batch_factors: passes and steps of each bucket hold so many times the usual number of images; default 1.

    Raises:
        UserError: there is no training image, or the accumulation is given and does not fit the batch.
        ValueError: both or neither of `steps` and `epochs` are given.
    """
    if (steps is None) == (epochs is None):
        raise ValueError("exactly one of steps and epochs must be given")
    if sum(rows_per_bucket) == 0:
        raise UserError("the data holds no training image: check data.sources and data.validation_fraction")
    images_per_pass = workers * batch_size_per_gpu
    images_per_step = global_batch_size or images_per_pass * (gradient_accumulation_steps or 1)
    accumulation = math.ceil(images_per_step / images_per_pass)
    if gradient_accumulation_steps not in (None, accumulation):
        raise UserError(
            f"train.gradient_accumulation_steps={gradient_accumulation_steps}: train.global_batch_size="
            f"{images_per_step} on {_count(workers, 'worker')} of {_count(batch_size_per_gpu, 'image')}"
            f" needs {accumulation}; leave one of the two out"
        )
    arithmetic = RunArithmetic(
        workers=workers,
        batch_size_per_gpu=batch_size_per_gpu,
        accumulation=accumulation,
        images_per_step=images_per_step,
        rows_per_bucket=tuple(rows_per_bucket),
        batch_factors=tuple(batch_factors or [1] * len(rows_per_bucket)),
        total_steps=steps or 0,
        checkpoint_every_steps=checkpoint_every_steps,
        checkpoint_every=checkpoint_every,
    )
    return arithmetic if epochs is None else replace(arithmetic, total_steps=epochs * arithmetic.steps_per_epoch)


def format_duration(seconds: float) -> str:
    """A length of time as a person says it: `45 s`, `3 min`, `2 h 05 min`, `11 d 4 h`."""
    if seconds < 59.5:
        return f"{round(seconds)} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24:,} d {hours % 24} h"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %") if share >= 0.01 else "under 1 %"

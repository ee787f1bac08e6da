"""The numbers of a run from its configuration and data; imports no torch."""

from collections.abc import Sequence

from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.errors import UserError
from trainer.measure.run_arithmetic import RunArithmetic, run_arithmetic

MOST_BATCHES = 16
"""Text encoders and the loader cost by the image, whatever its size: a limit to `train.batch_by_area`."""


def batch_factors(config: Config, buckets: Sequence[Bucket]) -> list[int]:
    """How many times the usual batch each bucket takes."""
    if not config.train.batch_by_area:
        return [1] * len(buckets)
    area = config.data.buckets.resolution**2
    return [min(MOST_BATCHES, max(1, area // (bucket.height_px * bucket.width_px))) for bucket in buckets]


def arithmetic_of(
    config: Config, workers: int, buckets: Sequence[Bucket], rows_per_bucket: Sequence[int]
) -> RunArithmetic:
    """Images per step, steps per epoch and where the run ends, on `workers` workers.

    Raises:
        UserError: a step has one image, and the objective needs others beside it.
    """
    arithmetic = run_arithmetic(
        workers=workers,
        batch_size_per_gpu=config.train.batch_size_per_gpu,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        global_batch_size=config.train.global_batch_size,
        rows_per_bucket=rows_per_bucket,
        batch_factors=batch_factors(config, buckets),
        steps=config.train.steps,
        epochs=config.train.epochs,
        checkpoint_every_steps=config.checkpoint.every_steps,
        checkpoint_every=config.checkpoint.every,
    )
    loss, noise, times = config.objective.loss, config.objective.noise, config.objective.timesteps
    needs = {"loss.contrast": loss.contrast, "noise.pairing": noise.pairing != "none"}
    needs |= {"timesteps.stratified": times.stratified}
    wanting = [name for name, is_on in needs.items() if is_on]
    if wanting and arithmetic.images_per_step == 1:
        raise UserError(
            f"objective.{wanting[0]}: has no effect on steps of one image; raise train.batch_size_per_gpu or "
            "train.gradient_accumulation_steps"
        )
    return arithmetic

"""The numbers of a run from its configuration and data; imports no torch."""

from collections.abc import Sequence

from trainer.config.schema import Config
from trainer.measure.arithmetic import RunArithmetic, run_arithmetic


def arithmetic_of(config: Config, workers: int, rows_per_bucket: Sequence[int]) -> RunArithmetic:
    """Images per step, steps per epoch and where the run ends, on `workers` workers."""
    return run_arithmetic(
        workers=workers,
        batch_size_per_gpu=config.train.batch_size_per_gpu,
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        global_batch_size=config.train.global_batch_size,
        rows_per_bucket=rows_per_bucket,
        steps=config.train.steps,
        epochs=config.train.epochs,
        checkpoint_every_steps=config.checkpoint.every_steps,
    )

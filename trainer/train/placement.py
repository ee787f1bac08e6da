"""Where a run stands in its data, how many steps that makes of it, and which state of the data it reads."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from trainer.config.schema import Config
from trainer.data.left_out import Stretch, steps_left_out, stretches_of
from trainer.data.mixture import Mixture
from trainer.data.sampler import EpochPlan, Position, RowsOfEpoch, steps_per_epoch, with_global_batch
from trainer.data.store.snapshot import SPLITS, PreparedSet
from trainer.data.store.snapshot_file import current_snapshot
from trainer.errors import UserError
from trainer.measure.run_arithmetic import RunArithmetic
from trainer.optim.loss_scale import LossScale
from trainer.parallel.comm import Comm, gather_objects
from trainer.train.arithmetic import arithmetic_of, batch_factors
from trainer.train.saved.state import TrainState

_log = logging.getLogger(__name__)


class DataOfRun(Protocol):
    """What of a run decides its place in the data; as `Run` has it."""

    @property
    def state(self) -> TrainState | None:
        """Where the resumed run stands; None for a fresh one."""
        ...

    @property
    def prepared(self) -> PreparedSet:
        """The data set."""
        ...

    @property
    def mixture(self) -> Mixture:
        """How much of it each epoch takes."""
        ...

    @property
    def left_out(self) -> Sequence[Stretch]:
        """Data that the run goes past."""
        ...


@dataclass(frozen=True)
class FoundData:
    """The same before there is the run."""

    state: TrainState | None
    prepared: PreparedSet
    mixture: Mixture
    left_out: tuple[Stretch, ...]


def starting_state(config: Config, run: DataOfRun, global_batch: int) -> TrainState:
    """Where the run goes on, or the start of a fresh one; a changed global batch opens a new segment."""
    epoch = run.state.position.epoch if run.state else 0
    rows_per_bucket, snapshot, left_out = run.mixture.rows(epoch), run.prepared.snapshot_name, tuple(run.left_out)
    factors, in_fp16 = batch_factors(config, run.prepared.buckets("train")), config.train.precision == "fp16"
    if run.state is None:
        start = Position.start(len(rows_per_bucket), global_batch, batch_factors=factors)
        scale = LossScale() if in_fp16 else None
        return TrainState(0, 0, start, snapshot, config.run.seed, scale, left_out=left_out)
    position = run.state.position
    if position.starts_epoch:  # whatever the snapshot before: this one's buckets may be others
        position = Position.start(len(rows_per_bucket), global_batch, position.epoch, factors)
    else:
        position = with_global_batch(position, rows_per_bucket, config.run.seed, global_batch, factors)
    scale = (run.state.loss_scale or LossScale()) if in_fp16 else None
    return replace(run.state, position=position, snapshot=snapshot, loss_scale=scale, left_out=left_out)


def place_in_data(config: Config, run: DataOfRun, world: int) -> tuple[TrainState, RunArithmetic]:
    """Where the run stands in the data it has, and what follows from the size of the data."""
    epoch = run.state.position.epoch if run.state else 0
    arithmetic = arithmetic_of(config, world, run.prepared.buckets("train"), run.mixture.rows(epoch))
    state = starting_state(config, run, arithmetic.images_per_step)
    return state, replace(arithmetic, total_steps=_total_steps(config, run.mixture.rows, state))


def _total_steps(config: Config, rows_of: RowsOfEpoch, state: TrainState) -> int:
    """The step at which the run ends; with `train.epochs`, what is left of this epoch and of those after it."""
    if config.train.steps is not None:
        return config.train.steps
    epochs_after_this = (config.train.epochs or 0) - state.position.epoch - 1
    if epochs_after_this < 0:
        return state.step
    position, left_out = state.position, stretches_of(state.left_out, state.snapshot, config.run.seed)
    this_epoch = EpochPlan(rows_of(position.epoch), config.run.seed, position).num_steps - position.step
    later = sum(
        steps_per_epoch(rows_of(position.epoch + 1 + e), position.global_batch, position.batch_factors)
        for e in range(epochs_after_this)
    )
    none = steps_left_out(rows_of, config.run.seed, position, left_out, epochs_after_this + 1)
    return state.step + this_epoch + later - none


def newest_snapshot(prepared: Path, comm: Comm) -> str | None:
    """Name of the newest snapshot that every worker sees: hosts may have copies of their own."""
    names = gather_objects(comm, current_snapshot(prepared))
    return None if None in names else min(names)


def has_snapshot(config: Config, comm: Comm, name: str) -> bool:
    """Whether every worker sees a snapshot of the run's data."""
    return all(gather_objects(comm, (config.data.prepared / "snapshots" / name).is_file()))


def require_masks(config: Config, prepared: PreparedSet) -> None:
    """UserError where the loss is to be masked and the snapshot, which may be an older one, holds no masks."""
    if config.objective.loss.masked and not prepared.has_masks:
        raise UserError(
            f"objective.loss.masked = true: snapshot {prepared.snapshot_name} of {prepared.path}, with which this "
            "epoch began, holds no masks; leave it false until the epoch ends, or start anew with run.resume=false"
        )


def check_shards(prepared: PreparedSet, max_bad_fraction: float) -> None:
    """Shards that are missing or cut short cost their rows; more than is allowed are an error at once."""
    missing = prepared.missing()
    images = sum(count for _, count in missing)
    lines = [f"{prepared.path}: {line}" for line, _ in missing[:20]]
    if images > max_bad_fraction * sum(prepared.images(split) for split in SPLITS):
        raise UserError(*lines)
    for line in lines:
        _log.warning("%s; its rows are left out", line)

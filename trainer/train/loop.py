"""The training loop: take a batch, take a step, record it; save, validate and sample when due."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.schema import Config
from trainer.data.augment import Augmentation
from trainer.data.left_out import steps_left_out, stretches_of
from trainer.data.loader import BatchReader, Loader, open_loader
from trainer.data.loss_weights import LossWeights
from trainer.data.mixture import Mixture
from trainer.data.sampler import EpochPlan, Position, RowsOfEpoch, epochs_done, steps_per_epoch, with_global_batch
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.image_weights import weighs_images
from trainer.evaluate.pictures import loss_curve_png
from trainer.measure.progress import ProgressLine
from trainer.measure.run_arithmetic import RunArithmetic
from trainer.measure.telemetry import MetricsWriter, StepMetrics, read_metrics
from trainer.model.latents import encoded_batches
from trainer.model_files.run_model import RunModel
from trainer.optim.loss_scale import LossScale
from trainer.optim.lr_schedule import lr_at
from trainer.optim.optimizers import first_lr
from trainer.parallel.comm import Comm, barrier, broadcast_object
from trainer.parallel.heartbeat import heartbeat_of_worker
from trainer.parallel.planned_faults import act_out
from trainer.parallel.worker import LOG_DIR
from trainer.publish.during_training import Exports
from trainer.train.arithmetic import arithmetic_of, batch_factors
from trainer.train.bad_rows import BadRows, forget_bad_rows_after, record_bad_rows
from trainer.train.build import Run, build_run, make_scorer, newest_snapshot
from trainer.train.caption_rules import caption_rules, caption_tokenizer, run_loss_weights
from trainer.train.guard.injected import flip_bit_if_planned, with_faults
from trainer.train.guard.numerics_guard import GuardRules, TakenStep
from trainer.train.guard.numerics_watch import NumericsWatch
from trainer.train.guard.replicas import Replicas
from trainer.train.pace import Pace
from trainer.train.run_objective import describe_objective, guidance_warning
from trainer.train.saved.averages import (
    follow,
    forget_snapshots_after,
    scored_weights,
)
from trainer.train.saved.room import require_checkpoint_room
from trainer.train.saved.saving import TOLD, Saving
from trainer.train.saved.state import TrainState
from trainer.train.step import StepResult, train_step

_log = logging.getLogger(__name__)


def train(config: Config, model: RunModel, comm: Comm, stop_requested: Callable[[], bool]) -> TrainState:
    """Train to the configured end, or until asked to stop; both end with a checkpoint.

    Args:
        stop_requested: asked in every step; any worker's yes ends all of them after that step.

    Returns:
        Where the run stands.
    """
    launch = config.launch
    heartbeat = heartbeat_of_worker(LOG_DIR, launch.hang_after_s, launch.hang_at_start_s)
    run = build_run(config, model, comm)
    state, arithmetic = _place_in_data(config, run)
    _announce(config, model, run, arithmetic, state)
    bad, limit = BadRows(), config.data.max_bad_fraction
    watch = NumericsWatch.of(config, comm, state)
    replicas = Replicas.of(config, run.parts, state.step)
    pace = Pace(run.parts, state.step)
    with ExitStack() as stack:
        outputs = None
        if comm.rank == 0:
            require_checkpoint_room(config, run.parts, state.step, arithmetic.total_steps)
            bad = forget_bad_rows_after(config.run.dir, state.step)
            forget_snapshots_after(config.run.dir, state.step)
            outputs = _Outputs.open(stack, config, state, arithmetic.total_steps, fresh=run.state is None)
        exports = stack.enter_context(Exports(config)) if comm.rank == 0 else None
        saving = Saving(config, run, heartbeat, lambda: exports and exports.checkpoint, replicas.compare)
        weights = scored_weights(config.ema, run.parts)
        scorer = make_scorer(config, model, comm, run.parts.denoiser, run.prepared, weights)
        if run.state is None:
            scorer.score_when_due(0, outputs and outputs.metrics, at_end=False)
        loader = stack.enter_context(open_training_loader(config, model, comm, run, state, arithmetic.accumulation))
        done = state.step >= arithmetic.total_steps
        while not done:
            heartbeat.begin("data", state.step)
            begin, waited_before = time.perf_counter(), loader.wait_s
            lr_factor = lr_at(state.step, arithmetic.total_steps, 1.0, config.lr_schedule)
            batches = next(loader)
            encoded = encoded_batches(run.parts.denoiser.image_encoder, batches.batches)
            scale = state.loss_scale.scale if state.loss_scale else 1.0
            heartbeat.begin("a step", state.step)
            act_out(comm.rank, state.step + 1)
            result = train_step(
                with_faults(pace.clocked(run.parts), state.step + 1),
                encoded,
                arithmetic.accumulation,
                batches.weight,
                lr_factor,
                stop_requested(),
                scale,
                tell=[*saving.tell(), *pace.tell()],
                before_update=saving.wait_copied,
                judge=watch.judge(state),
            )
            state = state_after(state, result, batches.position_after, watch.rules)
            flip_bit_if_planned(run.parts, state.step)
            follow(run.parts, state.step, result)
            record_bad_rows(config.run.dir, state.step, comm.rank, result.problems)
            bad = bad.after(round(result.num_images) + result.bad_rows, result.bad_rows)
            done = state.step >= arithmetic.total_steps or result.stop or bad.too_many(limit)
            if outputs:
                seconds, waited = time.perf_counter() - begin, loader.wait_s - waited_before
                epoch = epochs_done(state.position, run.mixture.rows(state.position.epoch))
                outputs.record(state, result, first_lr(run.parts.optimizer), seconds, waited, epoch, bad.total)
            watch.react(state, result, run.mixture.rows, saving.settle)
            if replicas.due(state.step):
                heartbeat.begin("a comparison of weights", state.step)
                replicas.compare(state.step, saving.settle)
            pace.after_step(result.told[TOLD:], state.step)
            saving.after_step(run, state, result.told[:TOLD], done=done)
            if bad.too_many(limit):
                barrier(comm)  # the first worker to fail ends the others, and rank 0 may still be saving
                raise bad.as_error(limit, config.run.dir)
            if not result.stop:
                if due := scorer.due(state.step, at_end=done):
                    heartbeat.begin(due[-1], state.step)
                    saving.wait_copied()  # an average may take the place of the weights
                scorer.score_when_due(state.step, outputs and outputs.metrics, at_end=done)
            if done:
                heartbeat.rest()
            if exports:  # after the samples, one of which is the file's thumbnail
                for step in saving.published():
                    exports.start_when_due(step, is_finished=step >= arithmetic.total_steps)
            if not done and state.position.starts_epoch:
                heartbeat.begin("new data", state.step)
                newer = _newer_data(config, comm, state)
                if newer:
                    loader.close()
                    run = replace(run, state=state, prepared=newer, mixture=Mixture.of(newer, config.run.seed))
                    state, arithmetic = _place_in_data(config, run)
                    scorer = replace(scorer, prepared=newer)
                    loader = stack.enter_context(
                        open_training_loader(config, model, comm, run, state, arithmetic.accumulation)
                    )
                    if outputs:
                        outputs.progress.set_total_steps(arithmetic.total_steps)
        if outputs:
            _draw_loss_curve(config.run.dir)
    pace.announce_end()
    _announce_end(config, state, arithmetic.total_steps)
    return state


def _draw_loss_curve(run_dir: Path) -> None:
    try:
        loss_curve_png(read_metrics(run_dir), run_dir / "loss.png", title=run_dir.name)
    except Exception as error:
        _log.warning("%s: not drawn: %s", run_dir / "loss.png", error)


def state_after(state: TrainState, result: StepResult, position: Position, rules: GuardRules) -> TrainState:
    """Where the run stands after a step."""
    taken = TakenStep(result.loss, result.grad_norm, result.num_images)
    return replace(
        state,
        step=state.step + 1,
        images_seen=state.images_seen + (round(result.num_images) if result.took_effect else 0),
        position=position,
        loss_scale=state.loss_scale and state.loss_scale.after(math.isfinite(result.grad_norm)),
        guard=state.guard.after(rules, result.verdict, taken, state.step),
    )


def starting_state(config: Config, run: Run, global_batch: int) -> TrainState:
    """Where the run goes on, or the start of a fresh one; a changed global batch opens a new segment."""
    epoch = run.state.position.epoch if run.state else 0
    rows_per_bucket, snapshot = run.mixture.rows(epoch), run.prepared.snapshot_name
    factors, in_fp16 = batch_factors(config, run.prepared.buckets("train")), config.train.precision == "fp16"
    if run.state is None:
        start = Position.start(len(rows_per_bucket), global_batch, batch_factors=factors)
        scale = LossScale() if in_fp16 else None
        return TrainState(0, 0, start, snapshot, config.run.seed, scale, left_out=run.left_out)
    position = run.state.position
    if position.starts_epoch:  # whatever the snapshot before: this one's buckets may be others
        position = Position.start(len(rows_per_bucket), global_batch, position.epoch, factors)
    else:
        position = with_global_batch(position, rows_per_bucket, config.run.seed, global_batch, factors)
    scale = (run.state.loss_scale or LossScale()) if in_fp16 else None
    return replace(run.state, position=position, snapshot=snapshot, loss_scale=scale, left_out=run.left_out)


def _place_in_data(config: Config, run: Run) -> tuple[TrainState, RunArithmetic]:
    """Where the run stands in the data it has, and what follows from the size of the data."""
    epoch, world = run.state.position.epoch if run.state else 0, run.parts.comm.world
    arithmetic = arithmetic_of(config, world, run.prepared.buckets("train"), run.mixture.rows(epoch))
    state = starting_state(config, run, arithmetic.images_per_step)
    return state, replace(arithmetic, total_steps=_total_steps(config, run.mixture.rows, state))


def _newer_data(config: Config, comm: Comm, state: TrainState) -> PreparedSet | None:
    """At an epoch's start: the data set with what was appended to it since, if anything was."""
    name = newest_snapshot(config.data.prepared, comm)
    if name is None or name == state.snapshot:
        return None
    prepared = PreparedSet.open(config.data.prepared, name)
    count = prepared.images("train")
    _log.info("epoch %d starts with snapshot %s: %s images to train on", state.position.epoch + 1, name, f"{count:,}")
    return prepared


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


def open_training_loader(
    config: Config, model: RunModel, comm: Comm, run: Run, state: TrainState, accumulation: int
) -> Loader:
    """This worker's batches from where the run stands."""
    tokenizers = None if config.data.cache_text else caption_tokenizer(config, model)
    augmentation = Augmentation(config.data.augment.flip_probability, config.data.augment.random_crop)
    loss = config.objective.loss
    return open_loader(
        BatchReader(
            run.prepared,
            "train",
            config.run.seed,
            tokenizers,
            augmentation,
            caption_rules(config),
            _loss_weights(config, comm, run.prepared),
            with_masks=loss.masked,
            unmasked_probability=loss.unmasked_probability,
            mixture=run.mixture if run.mixture.pools else None,
        ),
        state.position,
        rank=comm.rank,
        world=comm.world,
        micro_batch=config.train.batch_size_per_gpu,
        accumulation=accumulation,
        workers=config.data.workers,
        prefetch_batches=config.data.prefetch_batches,
        pin_memory=comm.device.type == "cuda",
        left_out=stretches_of(state.left_out, state.snapshot, config.run.seed),
    )


def _loss_weights(config: Config, comm: Comm, prepared: PreparedSet) -> LossWeights | None:
    """How much each image counts: rank 0 finds it out for all, who could see other files, or count minutes on end."""
    if not weighs_images(config.data.sources, config.objective.loss_weights):
        return None
    found = run_loss_weights(config, prepared) if comm.rank == 0 else None
    return LossWeights.from_json(broadcast_object(comm, found and found.to_json()))


def _announce(config: Config, model: RunModel, run: Run, arithmetic: RunArithmetic, state: TrainState) -> None:
    strategy, device = run.parts.strategy, run.parts.comm.device
    for name, module in run.parts.denoiser.model.named_children():
        weights = {full: p.numel() for full, p in module.named_parameters(prefix=name)}
        trained = sum(number for full, number in weights.items() if full in strategy.parameters)
        share = "all" if trained == sum(weights.values()) else f"{trained:,} of"
        if trained:
            _log.info("%s: %s %s weights train", name, share, f"{sum(weights.values()):,}")
        else:
            _log.info("%s: frozen", name)
    for line in describe_objective(config, model):
        _log.info("%s", line)
    if warning := guidance_warning(config):
        _log.warning("%s", warning)
    _log.info("%s on %s%s", config.train.precision, device.type, f", {strategy.sharing.kind}" * (strategy.world > 1))
    if config.ema.averages:
        _log.info("%s", config.ema.told())
    for line in arithmetic.describe(state.step):
        _log.info("%s", line)


def _announce_end(config: Config, state: TrainState, total_steps: int) -> None:
    newest = checkpoint_dir(config.run.dir, state.step)
    if state.step < total_steps:
        _log.info("stopped after step %d of %d, saved %s", state.step, total_steps, newest)
        _log.info("the same command goes on from there")
        return
    _log.info("done: step %d, %s images seen", state.step, f"{state.images_seen:,}")
    _log.info("weights: %s", newest)


@dataclass(frozen=True)
class _Outputs:
    """What rank 0 writes while the run goes on."""

    metrics: MetricsWriter
    progress: ProgressLine
    log_every: int

    @staticmethod
    def open(stack: ExitStack, config: Config, state: TrainState, total_steps: int, *, fresh: bool) -> "_Outputs":
        metrics = stack.enter_context(MetricsWriter(config.run.dir, None if fresh else state.step))
        progress = stack.enter_context(ProgressLine(total_steps, state.step))
        return _Outputs(metrics, progress, config.log.every_steps)

    def record(
        self,
        state: TrainState,
        result: StepResult,
        lr: float,
        seconds: float,
        waited: float,
        epoch: float,
        bad_rows: int,
    ) -> None:
        """Show a step, and write it down if it is time to."""
        metrics = StepMetrics(
            step=state.step,
            epoch=epoch,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            images=round(result.num_images),
            images_seen=state.images_seen,
            data_wait_s=waited,
            step_s=seconds,
            bad_rows=bad_rows,
            block_norms=result.block_norms,
        )
        self.progress.update(metrics)
        if state.step % self.log_every == 0:
            self.metrics.step(metrics)

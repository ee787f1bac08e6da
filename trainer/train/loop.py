"""The training loop: take a batch, take a step, record it; save, validate and sample when due."""

import gc
import logging
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.schema import Config
from trainer.data.augment import Augmentation
from trainer.data.left_out import stretches_of
from trainer.data.loader import BatchReader, Loader, StepBatches, open_loader
from trainer.data.loss_weights import LossWeights
from trainer.data.mixture import Mixture
from trainer.data.sampler import Position, epochs_done
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.image_weights import weighs_images
from trainer.disks.run_disks import disks_of, refusing_together
from trainer.evaluate.pictures import loss_curve_png
from trainer.evaluate.scoring import Scorer
from trainer.freed_memory import give_back
from trainer.measure.run_arithmetic import RunArithmetic
from trainer.measure.step_clock import arriving
from trainer.measure.telemetry import read_metrics
from trainer.model.latents import encoded_batches
from trainer.model_files.run_model import RunModel
from trainer.optim.lr_schedule import lr_at
from trainer.optim.optimizers import rates_of
from trainer.parallel.comm import Comm, barrier, broadcast_object, done_by_first
from trainer.parallel.heartbeat import LOADING, Heartbeat, heartbeat_of_worker
from trainer.parallel.planned_faults import act_out
from trainer.parallel.worker import LOG_DIR
from trainer.publish.during_training import Exports
from trainer.train.bad_rows import BadRows, forget_bad_rows_after, record_bad_rows
from trainer.train.build import Run, build_run, make_scorer
from trainer.train.caption_rules import caption_rules, caption_tokenizer, run_loss_weights
from trainer.train.guard.injected import flip_bit_if_planned, with_faults
from trainer.train.guard.numerics_guard import GuardRules, TakenStep
from trainer.train.guard.numerics_watch import NumericsWatch
from trainer.train.guard.replicas import Replicas
from trainer.train.pace import Pace
from trainer.train.placement import newest_snapshot, place_in_data
from trainer.train.run_objective import describe_objective, guidance_warning
from trainer.train.saved.averages import (
    follow,
    forget_snapshots_after,
    scored_weights,
)
from trainer.train.saved.part_times import part_times, resting_parts
from trainer.train.saved.room import require_checkpoint_room
from trainer.train.saved.saving import TOLD, Saving
from trainer.train.saved.state import TrainState
from trainer.train.step import StepResult, train_step
from trainer.train.told.run_outputs import RunOutputs
from trainer.wire.gradient_exchange import gradients_told

_log = logging.getLogger(__name__)


def train(config: Config, model: RunModel, comm: Comm, stop_requested: Callable[[], bool]) -> TrainState:
    """Train to the configured end, or until asked to stop; both end with a checkpoint.

    Where a part of the model begins or ends to train, the run is built anew from a checkpoint as well.

    Args:
        stop_requested: asked in every step; any worker's yes ends all of them after that step.

    Returns:
        Where the run stands.
    """
    checkpoint = None
    while True:
        state, checkpoint = _train_stretch(config, model, comm, stop_requested, checkpoint)
        if checkpoint is None:
            return state
        _give_back_memory(comm)


def _train_stretch(
    config: Config, model: RunModel, comm: Comm, stop_requested: Callable[[], bool], checkpoint: Path | None
) -> tuple[TrainState, Path | None]:
    """Train from a checkpoint, or from where the run is found, as long as the same parts of the model train.

    Returns:
        Where the run stands, and the checkpoint from which it goes on with other parts; None: it ends here.
    """
    launch = config.launch
    heartbeat = heartbeat_of_worker(LOG_DIR, launch.hang_after_s, launch.hang_at_start_s)
    heartbeat.begin(LOADING, 0)
    run = build_run(config, model, comm, checkpoint)
    state, arithmetic = place_in_data(config, run, comm.world)
    _announce(config, model, run, arithmetic, state)
    limit = config.data.max_bad_fraction
    watch = NumericsWatch.of(config, comm, state)
    replicas, pace = Replicas.of(config, run.parts, state.step), Pace(run.parts, state.step)
    with ExitStack() as stack:
        outputs = None
        bad = _forget_what_came_after(config, run, state, arithmetic.total_steps, is_first=checkpoint is None)
        if comm.rank == 0:
            outputs = RunOutputs.open(stack, config, run, pace.stragglers, state.step, arithmetic.total_steps)
        exports = stack.enter_context(Exports(config)) if comm.rank == 0 else None
        saving = Saving(config, run, heartbeat, lambda: exports and exports.checkpoint, replicas.compare)
        beside = _Beside(config, heartbeat, watch, pace, saving)
        weights = scored_weights(config.ema, run.parts)
        scorer = make_scorer(config, model, comm, run.parts.denoiser, run.prepared, weights)
        scorer = replace(scorer, disks=saving.disks)
        if run.state is None:
            scorer.score_when_due(0, outputs and outputs.metrics, at_end=False)
        open_loader_of = partial(open_training_loader, config, model, comm)
        loader = stack.enter_context(open_loader_of(run, state, arithmetic.accumulation))
        done, leaves = state.step >= arithmetic.total_steps, False
        while not (done or leaves):
            heartbeat.begin("data", state.step)
            begin, waited_before = time.perf_counter(), loader.wait_s
            batches = next(loader)
            result = _take_step(beside, run, state, arithmetic, batches, stop_requested())
            state = state_after(state, result, batches.position_after, watch.rules)
            _after_update(run, state, result)
            record_bad_rows(config.run.dir, state.step, comm.rank, result.problems)
            bad = bad.after(round(result.num_images) + result.bad_rows, result.bad_rows)
            done = state.step >= arithmetic.total_steps or result.stop or bad.too_many(limit)
            leaves = not done and resting_parts(run.times, state.step) != run.resting
            if outputs:
                seconds, waited = time.perf_counter() - begin, loader.wait_s - waited_before
                epoch = epochs_done(state.position, run.mixture.rows(state.position.epoch))
                outputs.record(state, result, rates_of(run.parts.optimizer), seconds, waited, epoch, bad.total)
            watch.react(state, result, run.mixture.rows, saving.settle)
            if replicas.due(state.step):
                heartbeat.begin("a comparison of weights", state.step)
                replicas.compare(state.step, saving.settle)
            _tell_times(pace, outputs, run, batches, result, state.step, at_end=done or leaves)
            saving.after_step(run, state, result.told[:TOLD], done=done or leaves)
            if bad.too_many(limit):
                barrier(comm)  # the first worker to fail ends the others, and rank 0 may still be saving
                raise bad.as_error(limit, config.run.dir)
            if not result.stop:
                _score(scorer, state.step, outputs, beside, at_end=done)
            if done or leaves:
                heartbeat.rest()
            if exports:  # after the samples, one of which is the file's thumbnail
                for step in saving.published():
                    exports.start_when_due(step, is_finished=step >= arithmetic.total_steps)
            if not (done or leaves) and state.position.starts_epoch:
                heartbeat.begin("new data", state.step)
                if newer := _newer_data(config, comm, state):
                    loader.close()
                    run, state, arithmetic = _with_newer_data(config, run, state, newer)
                    scorer = replace(scorer, prepared=newer)
                    loader = stack.enter_context(open_loader_of(run, state, arithmetic.accumulation))
                    if outputs:
                        outputs.progress.set_total_steps(arithmetic.total_steps)
        if not leaves:  # what the first worker has left to do may take longer than the others wait in an exchange
            done_by_first(comm, lambda: outputs and _wind_up(config.run.dir, exports))
    pace.announce_end()
    if leaves:
        return state, saving.path(state.step)
    _announce_end(config, state, arithmetic.total_steps)
    return state, None


class _Beside(NamedTuple):
    """What goes along with a run's steps."""

    config: Config
    heartbeat: Heartbeat
    watch: NumericsWatch
    pace: Pace
    saving: Saving


def _take_step(
    beside: _Beside, run: Run, state: TrainState, arithmetic: RunArithmetic, batches: StepBatches, stop_asked: bool
) -> StepResult:
    """A step of the run, on its batches."""
    lr_factor = lr_at(state.step, arithmetic.total_steps, 1.0, beside.config.lr_schedule)
    encoded = encoded_batches(run.parts.denoiser.image_encoder, arriving(run.parts.clock, batches.batches))
    scale = state.loss_scale.scale if state.loss_scale else 1.0
    beside.heartbeat.begin("a step", state.step)
    act_out(run.parts.comm.rank, state.step + 1)
    run.parts.strategy.begin_exchange(state.step, scale, is_last=state.step + 1 >= arithmetic.total_steps)
    return train_step(
        with_faults(run.parts, state.step + 1),
        encoded,
        arithmetic.accumulation,
        batches.weight,
        lr_factor,
        stop_asked,
        scale,
        tell=lambda: [*beside.saving.tell(), *beside.pace.tell()],
        before_update=beside.saving.wait_copied,
        judge=beside.watch.judge(state),
    )


def _after_update(run: Run, state: TrainState, result: StepResult) -> None:
    """What follows the weights; the optimizer's part of a step ends with it."""
    flip_bit_if_planned(run.parts, state.step)
    follow(run.parts, state.step, result)
    run.parts.clock.mark("other")


def _tell_times(
    pace: Pace,
    outputs: RunOutputs | None,
    run: Run,
    batches: StepBatches,
    result: StepResult,
    step: int,
    *,
    at_end: bool,
) -> None:
    """Where the time of the step went, as all workers have told."""
    rows = pace.after_step(result.told[TOLD:], step)
    if outputs:
        outputs.record_times(rows, run, batches, result, step, done=at_end)


def _score(scorer: Scorer, step: int, outputs: RunOutputs | None, beside: _Beside, *, at_end: bool) -> None:
    """Validate and draw, if it is time to."""
    beside.pace.clock.mark(None)
    if due := scorer.due(step, at_end=at_end):
        beside.heartbeat.begin(due[-1], step)
        beside.saving.wait_copied()  # an average may take the place of the weights
    scorer.score_when_due(step, outputs and outputs.metrics, at_end=at_end)
    if outputs and "samples" in due:
        outputs.messages.drawn(step, scorer.folder.glob(f"step-{step:08d}*.png"))
    beside.pace.clock.mark("other")


def _forget_what_came_after(
    config: Config, run: Run, state: TrainState, total_steps: int, *, is_first: bool
) -> BadRows:
    """Of the run's records, what came after where it stands; the bad rows up to there. All workers call it.

    Args:
        is_first: the first stretch of this start, before which there must be room for the run's checkpoints.
    """
    disks = disks_of(run.parts.comm, local=config.run.on_local_disks)
    if is_first:
        with refusing_together(disks):
            if disks.is_first:
                require_checkpoint_room(config, run.parts, state.step, total_steps)
    if not disks.is_first:
        return BadRows()
    forget_snapshots_after(config.run.dir, state.step)
    return forget_bad_rows_after(config.run.dir, state.step)


def _give_back_memory(comm: Comm) -> None:
    """Of a stretch of the run that has ended."""
    gc.collect()
    if comm.device.type == "cuda":
        torch.cuda.empty_cache()


def _with_newer_data(
    config: Config, run: Run, state: TrainState, newer: PreparedSet
) -> tuple[Run, TrainState, RunArithmetic]:
    """The run at an epoch's start, with the data as they are now."""
    run = replace(run, state=state, prepared=newer, mixture=Mixture.of(newer, config.run.seed))
    state, arithmetic = place_in_data(config, run, run.parts.comm.world)
    times = part_times(config, arithmetic.total_steps, state.step, run.times)
    return replace(run, times=times), state, arithmetic


def _wind_up(run_dir: Path, exports: Exports | None) -> None:
    """A run that ends: draw its loss, and wait for its export."""
    if exports:
        exports.finish()
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


def _newer_data(config: Config, comm: Comm, state: TrainState) -> PreparedSet | None:
    """At an epoch's start: the data set with what was appended to it since, if anything was."""
    name = newest_snapshot(config.data.prepared, comm)
    if name is None or name == state.snapshot:
        return None
    prepared = PreparedSet.open(config.data.prepared, name)
    count = prepared.images("train")
    _log.info("epoch %d starts with snapshot %s: %s images to train on", state.position.epoch + 1, name, f"{count:,}")
    return prepared


def open_training_loader(
    config: Config, model: RunModel, comm: Comm, run: Run, state: TrainState, accumulation: int
) -> Loader:
    """This worker's batches from where the run stands."""
    tokenizers = None if config.data.cache_text else caption_tokenizer(config, model)
    augmentation = Augmentation(config.data.augment.flip_probability, config.data.augment.random_crop)
    loss = config.objective.loss
    give_back()  # what loading the model and the tokenizers took besides
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
        if name in run.resting:
            _log.info("%s: rests in this part of the run", name)
        elif trained:
            _log.info("%s: %s %s weights train", name, share, f"{sum(weights.values()):,}")
        else:
            _log.info("%s: frozen", name)
    for line in describe_objective(config, model):
        _log.info("%s", line)
    if warning := guidance_warning(config):
        _log.warning("%s", warning)
    how = f", {strategy.sharing.kind}" * (strategy.world > 1)
    if (within := strategy.sharing.within) is not None:
        how += f" sharded over {within} workers, {strategy.sharing.replicas(strategy.world)} replicas"
    _log.info("%s on %s%s", config.train.precision, device.type, how)
    if strategy.sharing.kind == "ddp":
        _log.info("%s", gradients_told(config.exchange, strategy))
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

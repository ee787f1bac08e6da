"""Builds the parts of a run from its configuration, and puts a checkpoint's state into them."""

import logging
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor, nn

from trainer.adapters.initial_values import AdapterStart
from trainer.checkpoint.run_dir import read_state
from trainer.config.schema import Config
from trainer.config.sections.adapter_config import only_additions_train
from trainer.data.buckets import Bucket
from trainer.data.left_out import Stretch
from trainer.data.mixture import Mixture
from trainer.data.sampler import next_epoch
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.image_weights import weighs_images
from trainer.diffusion.noise import Draws
from trainer.diffusion.objective import Objective
from trainer.errors import UserError
from trainer.evaluate.drawing.places import SAMPLES
from trainer.evaluate.scoring import Scorer
from trainer.measure.step_clock import StepClock
from trainer.memory.run_choice import MemoryChoice, choose_memory, smallest_card
from trainer.memory.run_plan import Setting
from trainer.model.adapted import lay_out_run
from trainer.model.channels_last import prefer_channels_last
from trainer.model.compiled import compile_blocks
from trainer.model.denoiser import Denoiser, TrainedModel, image_losses
from trainer.model.frozen.packed_weights import require_kernels
from trainer.model.load_weights import load_text_encoders, load_vae
from trainer.model.new_tokens import NewTokens
from trainer.model.recompute import apply_recompute, embeddings, gathered_units, repeated_blocks
from trainer.model.selection.weight_rates import Rate
from trainer.model.text import TextEncoders
from trainer.model.vae import ImageEncoder
from trainer.model_files.run_model import RunModel
from trainer.optim.adamw import Rounding
from trainer.optim.adamw_chunk import Update, compiled_update
from trainer.optim.clipping import clip_units
from trainer.optim.hosted.hosted_activations import HostedActivations
from trainer.optim.hosted.hosted_weights import HostedWeights
from trainer.optim.optimizers import is_compiled, load_optimizer_tensors, make_optimizer
from trainer.optim.precision import DTYPES, precision_of, require_arithmetic
from trainer.parallel.comm import Comm, gather_objects
from trainer.parallel.sharding import materialize
from trainer.parallel.strategy import Sharing, Strategy, make_strategy, timed, warm_up
from trainer.train.arithmetic import arithmetic_of
from trainer.train.caption_rules import caption_rules, caption_tokenizer
from trainer.train.dry_run import dry_run
from trainer.train.gradient_blocks import gradient_blocks
from trainer.train.groups import parameter_groups
from trainer.train.guard.left_out_record import agreed_left_out, merged
from trainer.train.memory_inputs import make_setting, planned_run
from trainer.train.placement import FoundData, check_shards, has_snapshot, newest_snapshot, place_in_data, require_masks
from trainer.train.release import release_of
from trainer.train.run_objective import make_objective
from trainer.train.saved.averages import averages_of, take_up_averages
from trainer.train.saved.base_model import frozen_fingerprints, require_same_base
from trainer.train.saved.exchange_state import take_up_exchange
from trainer.train.saved.find_resume import find_resume_point
from trainer.train.saved.model_weights import fill_model
from trainer.train.saved.objective_state import take_up_objective
from trainer.train.saved.part_times import PartTimes, has_times, part_times, recorded_times, resting_parts
from trainer.train.saved.state import TrainState
from trainer.train.saved.worker_state import stored_moments, take_up_workers
from trainer.train.step import StepParts, by_loss_weight
from trainer.train.step_companions import meeting_of
from trainer.train.trained_parts import what_trains
from trainer.wire.gradient_exchange import with_exchange
from trainer.wire.outer_average import with_average

_log = logging.getLogger(__name__)
_WEIGHTS_WORTH_COMPILING = 100e6  # of a worker


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        parts: what every step uses.
        state: where the resumed run stands; None for a fresh one.
        frozen: what of the model does not train, by `frozen_fingerprints`.
        prepared: the data set, opened at the snapshot that `state` refers to, or the newest at an epoch's start.
        mixture: how much of it each epoch takes.
        left_out: data that the run goes past.
        times: when parts of the model train; empty where all do throughout.
        resting: parts that do not train in this stretch of the run.
        flops_per_px: see `MemoryChoice`.
    """

    parts: StepParts
    state: TrainState | None
    prepared: PreparedSet
    mixture: Mixture
    frozen: Mapping[str, str]
    left_out: tuple[Stretch, ...] = ()
    times: Mapping[str, PartTimes] = field(default_factory=dict)
    resting: frozenset[str] = frozenset()
    flops_per_px: float | None = None


class BucketedData(Protocol):
    """What the memory plan has to know of the data."""

    def buckets(self, split: str) -> list[Bucket]:
        """Those that have rows."""
        ...

    def rows_per_bucket(self, split: str) -> list[int]:
        """Rows of each of them."""
        ...


class StoredData(Protocol):
    """What the model has to know of the data it trains on."""

    @property
    def holds_images(self) -> bool:
        """Whether they are images, and not latents."""
        ...

    @property
    def scaling_factor(self) -> float:
        """What the UNet sees are stored latents times this."""
        ...


def build_run(config: Config, model: RunModel, comm: Comm, checkpoint: Path | None = None) -> Run:
    """Load model, data and training state, and share the model among the workers.

    Args:
        checkpoint: to go on from; None: the one that `run.resume` says.
    """
    require_arithmetic(config.train.precision, comm.device)
    require_kernels(config.model.frozen_weights, comm.device)
    checkpoint = checkpoint or find_resume_point(config, comm)
    state = TrainState.from_json(read_state(checkpoint), checkpoint) if checkpoint else None
    if state is not None and state.seed != config.run.seed:
        raise UserError(f"run.seed = {config.run.seed}: the run in {config.run.dir} was started with {state.seed}")
    frozen = frozen_fingerprints(config, model, comm)
    if checkpoint is not None:
        require_same_base(config, frozen, checkpoint)
    # An epoch that has begun stays with its snapshot, for its position counts that one's rows.
    if state is not None and not state.position.starts_epoch and not has_snapshot(config, comm, state.snapshot):
        epoch = state.position.epoch
        _log.warning("snapshot %s was pruned: epoch %d ends here, %d begins", state.snapshot, epoch + 1, epoch + 2)
        state = replace(state, position=next_epoch(state.position))
    within_epoch = state is not None and not state.position.starts_epoch
    name = state.snapshot if state and within_epoch else newest_snapshot(config.data.prepared, comm)
    prepared = PreparedSet.open(config.data.prepared, name)
    require_masks(config, prepared)
    check_shards(prepared, config.data.max_bad_fraction)
    setting = worker_setting(config, comm, prepared, smallest_card(comm))
    choice = choose_memory(planned_run(config, model), comm, setting)
    left_out = merged(state.left_out if state else (), agreed_left_out(config.run.dir, comm))
    mixture = Mixture.of(prepared, config.run.seed)
    times = _part_times(config, FoundData(state, prepared, mixture, left_out), comm, checkpoint)
    resting = resting_parts(times, state.step if state else 0)
    parts = build_parts(config, model, comm, prepared, choice, checkpoint, resting)
    return Run(parts, state, prepared, mixture, frozen, left_out, times, resting, choice.flops_per_px)


def _part_times(config: Config, data: FoundData, comm: Comm, checkpoint: Path | None) -> dict[str, PartTimes]:
    if not has_times(config):
        return {}
    state, arithmetic = place_in_data(config, data, comm.world)
    before = recorded_times(read_state(checkpoint), checkpoint) if checkpoint else {}
    return part_times(config, arithmetic.total_steps, state.step, before)


def build_parts(
    config: Config,
    model_files: RunModel,
    comm: Comm,
    data: StoredData,
    choice: MemoryChoice,
    checkpoint: Path | None = None,
    resting: Collection[str] = (),
) -> StepParts:
    """The model, shared among the workers, and its optimizer; as they were in the checkpoint if one is given.

    Args:
        resting: parts of the model that train at another time of the run.
    Raises:
        OutOfMemory: a step on the largest bucket does not fit.
    """
    model, sharing = _laid_out(config, model_files, resting), _sharing(config, choice)
    if config.train.channels_last:
        prefer_channels_last(model.unet)
    if config.train.compile == "blocks":
        _log.info("%d kinds of blocks are compiled in the first steps", compile_blocks(model))
    weights = None
    if choice.hosts_weights:
        weights = HostedWeights(repeated_blocks(model), comm.device)
    apply_recompute(model, choice.recompute)
    HostedActivations(repeated_blocks(model), choice.moved, comm.device)
    fill = partial(fill_model, model_files, checkpoint)
    clock, units = StepClock(comm.device), gathered_units(model).values()
    elsewhere = weights.parameters if weights else ()
    strategy = make_strategy(model, sharing, units, embeddings(model).values(), comm, fill, model.resting, elsewhere)
    joined = with_average if config.exchange.averages_weights else with_exchange
    strategy, is_timed = timed(joined(config.exchange, strategy, comm, config.run.seed), clock, comm.device)
    denoiser = make_denoiser(config, model_files, model.train(), data, comm.device, sharing)
    optimizer = optimizer_for(config, strategy, comm, model.rates)
    clip, around, averages = config.train.max_grad_norm, choice.around_forward(model), averages_of(config.ema, strategy)
    meet = meeting_of(denoiser.objective, comm)
    parts = StepParts(comm, strategy, optimizer, denoiser, clip, around, meet=meet, averages=averages)
    parts = replace(parts, clock=clock, exchange_is_timed=is_timed)
    if config.train.adaptive_clip:
        clips = partial(clip_units, strategy.parameters.values(), config.train.adaptive_clip)
        parts = replace(parts, before_norm=clips)
    if config.memory.release_gradients:
        parts = replace(parts, hosted_weights=weights)
        parts = replace(parts, release=release_of(config, strategy, optimizer, choice, comm.device, weights))
    if weighs_images(config.data.sources, config.objective.loss_weights):
        parts = replace(parts, weigh=by_loss_weight)
    if config.log.block_norms:
        parts = replace(parts, blocks=gradient_blocks(strategy, comm.device))
    # torch.compile takes one image for another case than several.
    images = min(config.train.batch_size_per_gpu, 2)
    warm_up(strategy, partial(_throw_away_loss, denoiser, comm.device, images))
    dry_run(config, parts, choice)
    if checkpoint is not None:
        hosted = parts.release.hosted if parts.release else None
        moments, place = stored_moments(checkpoint, strategy, comm), torch.device("cpu") if hosted else None
        load_optimizer_tensors(optimizer, strategy.parameters, moments, place)
        if hosted:
            hosted.adopt()
        take_up_averages(parts, checkpoint)
        take_up_objective(config.objective, denoiser.objective, checkpoint)
        take_up_exchange(strategy, comm, checkpoint)
        take_up_workers(strategy, comm, checkpoint)
    return parts


def _sharing(config: Config, choice: MemoryChoice) -> Sharing:
    only_added = only_additions_train(config.trainable, config.adapter)
    sharing = choice.sharing(config.train.precision, only_additions=only_added)
    steps_alone = sharing.kind == "ddp" and config.exchange.averages_weights
    return replace(sharing, steps_alone=steps_alone, bucket_mib=config.exchange.wished_bucket_mib)


def optimizer_for(
    config: Config, strategy: Strategy, comm: Comm, rates: Mapping[str, Rate] | None = None
) -> torch.optim.Optimizer:
    """The run's optimizer over what trains, in groups of one learning rate and weight decay; `rates` as in
    `parameter_groups`."""
    rounding = precision_of(config.train.precision).rounding
    groups = parameter_groups(config, rates or {}, strategy.parameters)
    return make_optimizer(
        {group.name: group.parameters for group in groups},
        config.optimizer,
        peak_lrs={group.name: group.peak_lr for group in groups},
        weight_decays={group.name: group.weight_decay for group in groups},
        rounding=rounding,
        seed=config.run.seed,
        update=_agreed_update(config, strategy, comm, rounding) if is_compiled(config.optimizer, rounding) else None,
        # Of DDP's gradients, which are views of its buckets, nothing would be freed.
        free_gradients=not strategy.sharing.is_wrapped,
    )


def _agreed_update(config: Config, strategy: Strategy, comm: Comm, rounding: Rounding | None) -> Update | None:
    """Compiled arithmetic of the optimizer, if it is wanted and every worker has it: last bits may differ."""
    wish = config.optimizer.compile
    each = sum(parameter.numel() for parameter in strategy.parameters.values())  # the same on every worker
    each /= strategy.sharing.shares(comm.world)
    if wish is False or (wish == "auto" and each < _WEIGHTS_WORTH_COMPILING):
        return None
    update = compiled_update(config.optimizer.kind == "adamw_8bit", rounding, comm.device)
    return update if all(gather_objects(comm, update is not None)) else None


def load_denoiser(
    config: Config, model_files: RunModel, weights: Path, average: str, prepared: PreparedSet, device: torch.device
) -> Denoiser:
    """The weights of a checkpoint, or one of their averages, on one worker, and what the loss needs.

    Args:
        average: see `fill_model`.
    """
    require_kernels(config.model.frozen_weights, device)
    model = _laid_out(config, model_files).requires_grad_(False)
    materialize(model, device)
    fill_model(model_files, weights, model, average)
    return make_denoiser(config, model_files, model.eval(), prepared, device, Sharing("single"))


def make_denoiser(
    config: Config,
    model_files: RunModel,
    model: TrainedModel,
    data: StoredData,
    device: torch.device,
    sharing: Sharing,
) -> Denoiser:
    """The model together with what its loss needs."""
    encoders, image_encoder = None, None
    if not config.data.cache_text and model.text_encoders is None:
        encoders = frozen_text_encoders(config, model_files, device)
    if data.holds_images:
        image_encoder = ImageEncoder(frozen_vae(config, model_files, device), config.data.vae_batch_size)
    precision = precision_of(config.train.precision)
    shift = config.model.latent_shift
    data_scale = image_encoder.vae.config["scaling_factor"] if image_encoder else data.scaling_factor
    return Denoiser(
        model=model,
        objective=make_objective(config, model_files),
        frozen_text_encoders=encoders,
        image_encoder=image_encoder,
        scaling_factor=config.model.latent_scale or data_scale,
        latent_shift=shift if shift is not None else (model_files.config("vae").get("shift_factor") or 0.0),
        input_dtype=sharing.compute_dtype or precision.weights,
        autocast_dtype=None if sharing.compute_dtype else precision.autocast,
    )


def frozen_text_encoders(config: Config, model_files: RunModel, device: torch.device) -> TextEncoders:
    """The run's text encoders as they are in its model."""
    dtype = DTYPES[config.model.text_encoder_precision]
    return load_text_encoders(model_files, dtype, device, config.captions.chunks)


def frozen_vae(config: Config, model_files: RunModel, device: torch.device) -> AutoencoderKL:
    """The run's VAE."""
    return load_vae(model_files, DTYPES[config.model.vae_precision], device)


def make_scorer(
    config: Config,
    model_files: RunModel,
    comm: Comm,
    denoiser: Denoiser,
    prepared: PreparedSet,
    weights: Mapping[str, Callable[[], AbstractContextManager[None]]] | None = None,
) -> Scorer:
    """What validates and draws; the text encoders, the VAE and the tokenizers are loaded when it first needs them."""
    return Scorer(
        comm=comm,
        denoiser=denoiser,
        prepared=prepared,
        validation=config.validation,
        samples=config.samples,
        captions=caption_rules(config).as_settled(),
        seed=config.run.seed,
        images_per_pass=config.train.batch_size_per_gpu,
        resolution_px=config.data.buckets.resolution,
        folder=config.run.dir / SAMPLES,
        run_name=config.run.dir.absolute().name,
        cached_text=config.data.cache_text,
        masked=config.objective.loss.masked,
        load_tokenizer=partial(caption_tokenizer, config, model_files),
        load_text_encoders=partial(frozen_text_encoders, config, model_files, comm.device),
        load_vae=partial(frozen_vae, config, model_files, comm.device),
        weights=weights or {},
    )


def _laid_out(config: Config, model_files: RunModel, resting: Collection[str] = ()) -> TrainedModel:
    precision, adapter = precision_of(config.train.precision), AdapterStart(config.adapter, config.run.seed)
    dtypes = precision.weights, precision.compute
    tokens = NewTokens(tuple(config.new_tokens.tokens), config.run.seed)
    parts, join, held = what_trains(config), config.captions.chunks, config.model.frozen_weights
    return lay_out_run(model_files, parts, adapter, *dtypes, join, resting, tokens, held)


def worker_setting(config: Config, comm: Comm, data: BucketedData, card: int | None) -> Setting:
    """What the memory plan hangs on beside the run, in this process's place; `card` as `smallest_card` found it."""
    buckets, here = data.buckets("train"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    passes = arithmetic_of(config, comm.world, buckets, data.rows_per_bucket("train")).accumulation
    kernels = "cuda" if comm.device.type == "cuda" else "cpu"
    return make_setting(config, kernels, card, comm.world, here, buckets, passes)


def _throw_away_loss(denoiser: Denoiser, device: torch.device, images: int, model: nn.Module) -> Tensor:
    """A loss through every weight, on the smallest input that the UNet takes."""
    config = dict(denoiser.unet.config)
    latents = torch.zeros(images, config["in_channels"], 8, 8, device=device)
    text = {"input_ids": torch.zeros(images, 2, 1, 77, dtype=torch.int64, device=device)}
    if denoiser.model.text_encoders is None:
        pooled_dim = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        text = {
            "text_hidden": torch.zeros(images, 77, config["cross_attention_dim"], device=device),
            "text_pooled": torch.zeros(images, pooled_dim, device=device),
        }
    mixture = denoiser.objective.prediction.mix(torch.full((images,), 0.5, dtype=torch.float64)).to(device)
    time_ids = torch.zeros(images, 6, device=device)
    objective = Objective(denoiser.objective.prediction)
    return image_losses(denoiser, model, latents, Draws(latents), mixture, text, time_ids, objective).mean()

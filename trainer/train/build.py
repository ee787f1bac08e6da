"""Builds the parts of a run from its configuration, and puts a checkpoint's state into them."""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.config.schema import Config
from trainer.data.snapshot import SPLITS, PreparedSet
from trainer.data.snapshot_file import current_snapshot
from trainer.diffusion.objective import epsilon_objective
from trainer.diffusion.schedule import scaled_linear
from trainer.dist.comm import Comm, broadcast_object, gather_objects
from trainer.dist.strategy import make_strategy, warm_up
from trainer.errors import UserError
from trainer.model.denoiser import Denoiser, image_losses
from trainer.model.load import load_text_encoders, load_unet, load_vae
from trainer.model.text import TextConditioning
from trainer.model.vae import ImageEncoder
from trainer.train.checkpoint import OPTIMIZER, read_tensors
from trainer.train.optim import load_optimizer_tensors, make_optimizer
from trainer.train.precision import DTYPES, autocast_dtype
from trainer.train.run_dir import find_damage, newest_checkpoint, read_state
from trainer.train.state import TrainState
from trainer.train.step import StepParts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A run that is ready to train.

    Attributes:
        parts: what every step uses.
        state: where the resumed run stands; None for a fresh one.
        prepared: the data set, opened at the snapshot that `state` refers to, or the newest at an epoch's start.
    """

    parts: StepParts
    state: TrainState | None
    prepared: PreparedSet


def find_resume_point(config: Config, comm: Comm) -> Path | None:
    """The checkpoint to go on from, by `run.resume`; rank 0 looks, all workers agree."""
    found: Path | None = None
    if comm.rank == 0:
        wish = config.run.resume
        if isinstance(wish, str) and wish != "auto":
            found = Path(wish)
            damage = find_damage(found)
            if damage is not None:
                raise UserError(f"run.resume = {wish}: {damage}")
        elif wish is not False:
            found = newest_checkpoint(config.run.dir, _log.warning)
    agreed = broadcast_object(comm, str(found) if found else None)
    return Path(agreed) if agreed else None


def build_run(config: Config, comm: Comm) -> Run:
    """Load model, data and training state; every worker holds the whole model (DDP)."""
    checkpoint = find_resume_point(config, comm)
    state = TrainState.from_json(read_state(checkpoint), checkpoint) if checkpoint else None
    if state is not None and state.seed != config.run.seed:
        raise UserError(f"run.seed = {config.run.seed}: the run in {config.run.dir} was started with {state.seed}")
    # An epoch that has begun stays with its snapshot, for its position counts that one's rows.
    within_epoch = state is not None and not state.position.starts_epoch
    name = state.snapshot if state and within_epoch else newest_snapshot(config.data.prepared, comm)
    prepared = PreparedSet.open(config.data.prepared, name)
    _check_shards(prepared, config.data.max_bad_fraction)
    denoiser = load_denoiser(config, checkpoint or config.model.path, prepared, comm.device)
    denoiser.unet.train()
    if config.train.gradient_checkpointing:
        denoiser.unet.enable_gradient_checkpointing()
    strategy = make_strategy(denoiser.unet, comm)
    optimizer = make_optimizer(strategy.parameters, config.optimizer)
    if checkpoint is not None:
        load_optimizer_tensors(optimizer, strategy.parameters, read_tensors(checkpoint / OPTIMIZER))
    warm_up(strategy, partial(_throw_away_loss, denoiser, comm.device))
    return Run(StepParts(comm, strategy, optimizer, denoiser, config.train.max_grad_norm), state, prepared)


def newest_snapshot(prepared: Path, comm: Comm) -> str | None:
    """Name of the newest snapshot that every worker sees: hosts may have copies of their own."""
    names = gather_objects(comm, current_snapshot(prepared))
    return None if None in names else min(names)


def _check_shards(prepared: PreparedSet, max_bad_fraction: float) -> None:
    """Shards that are missing or cut short cost their rows; more than is allowed are an error at once."""
    missing = prepared.missing()
    images = sum(count for _, count in missing)
    lines = [f"{prepared.path}: {line}" for line, _ in missing[:20]]
    if images > max_bad_fraction * sum(prepared.images(split) for split in SPLITS):
        raise UserError(*lines)
    for line in lines:
        _log.warning("%s; its rows are left out", line)


def load_denoiser(config: Config, weights: Path, prepared: PreparedSet, device: torch.device) -> Denoiser:
    """The UNet of `weights`/unet in fp32, and what its loss needs, as the configuration says."""
    model, encoders, image_encoder = config.model, None, None
    if not config.data.cache_text:
        encoders = load_text_encoders(model.path, DTYPES[model.text_encoder_precision], device)
    if prepared.holds_images:
        vae = load_vae(model.path, model.vae, DTYPES[model.vae_precision], device)
        image_encoder = ImageEncoder(vae, config.data.vae_batch_size)
    return Denoiser(
        unet=load_unet(weights, torch.float32, device),
        objective=epsilon_objective(scaled_linear().to(device)),
        text_encoders=encoders,
        image_encoder=image_encoder,
        scaling_factor=image_encoder.vae.config["scaling_factor"] if image_encoder else prepared.scaling_factor,
        autocast_dtype=autocast_dtype(config.train.precision),
    )


def _throw_away_loss(denoiser: Denoiser, device: torch.device, model: nn.Module) -> Tensor:
    """A loss through every weight, on the smallest input that the UNet takes."""
    config = dict(denoiser.unet.config)
    latents = torch.zeros(1, config["in_channels"], 8, 8, device=device)
    pooled_dim = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    text = TextConditioning(
        torch.zeros(1, 77, config["cross_attention_dim"], device=device), torch.zeros(1, pooled_dim, device=device)
    )
    timesteps = torch.zeros(1, dtype=torch.int64, device=device)
    time_ids = torch.zeros(1, 6, device=device)
    return image_losses(denoiser, model, latents, latents, timesteps, text, time_ids).mean()

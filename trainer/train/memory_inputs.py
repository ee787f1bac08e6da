"""From a configuration to what its memory plan is made of; imports no torch."""

import math
from collections.abc import Sequence
from typing import Literal

from trainer.config.schema import Config
from trainer.config.section_rules.rules_release import hosted_weight_rules
from trainer.config.sections.ema_config import LIVE
from trainer.data.buckets import Bucket, make_buckets
from trainer.memory.holdings import Kernels
from trainer.memory.planned_run import PlannedRun
from trainer.memory.run_plan import Setting, make_budget
from trainer.model.text import TOKENS_PER_CHUNK
from trainer.model_files.run_model import RunModel
from trainer.parallel.shard_groups import workers_within
from trainer.train.arithmetic import batch_factors
from trainer.train.run_objective import extra_noises
from trainer.train.trained_parts import what_trains


def planned_run(config: Config, model: RunModel) -> PlannedRun:
    """What the run's memory hangs on."""
    trainable = what_trains(config)
    ema = config.ema
    return PlannedRun(
        model=model,
        trainable=trainable,
        adapter=config.adapter,
        new_tokens=tuple(config.new_tokens.tokens),
        precision=config.train.precision,
        vae_precision=config.model.vae_precision,
        text_encoder_precision=config.model.text_encoder_precision,
        optimizer=config.optimizer.kind,
        batch_size=config.train.batch_size_per_gpu,
        chunks=config.captions.max_tokens // TOKENS_PER_CHUNK,
        chunk_join=config.captions.chunks,
        cache_text=config.data.cache_text,
        holds_images=config.data.mode == "images",
        vae_batch_size=config.data.vae_batch_size,
        validates=config.validation.every_steps > 0,
        sample_px=_largest_sample(config) if config.samples.every_steps else None,
        budget=config.memory.budget,
        strategy=_strategy(config),
        shard_within=config.memory.shard_within,
        recompute=config.memory.recompute,
        offload_activations=config.memory.offload_activations,
        link_bytes_per_s=config.memory.link_gb_s * 1e9,
        data_workers=config.data.workers,
        checkpoints=config.checkpoint.keep + 1,
        extra_noises=extra_noises(config.objective),
        averages=len(ema.averages),
        averages_place=ema.place,
        scores_averages=ema.score != [LIVE],
        snapshot_averages=sum(each.kind == "power" for each in ema.averages) if ema.snapshots.every_steps else 0,
        releases_gradients=config.memory.release_gradients,
        offload_optimizer=config.memory.offload_optimizer,
        offload_weights=_offload_weights(config),
        frozen_weights=config.model.frozen_weights,
        exchange=config.exchange,
        snapshot_bytes=4 if ema.snapshots.dtype == "fp32" else 2,
    )


def _largest_sample(config: Config) -> tuple[int, int]:
    """Height and width of the image that takes most memory to decode."""
    samples, side = config.samples, config.data.buckets.resolution
    height, width = samples.height_px or side, samples.width_px or side
    sizes = [(image.height_px or height, image.width_px or width) for image in samples.images]
    if samples.prompts or not samples.images:
        sizes.append((height, width))
    return max(sizes, key=math.prod)


def _offload_weights(config: Config) -> Literal["auto"] | bool:
    """The wish; False where something forbids what `auto` leaves open."""
    wish = config.memory.offload_weights
    is_open = config.memory.release_gradients and not any(hosted_weight_rules(config))
    return wish if is_open else False


def _strategy(config: Config) -> Literal["auto", "ddp", "zero2", "zero3"]:
    """The wish; where `auto` leaves no choice, what it comes to."""
    wish = config.memory.strategy
    is_ddp = wish == "auto" and (config.exchange.method != "plain" or config.exchange.averages_weights)
    return "ddp" if is_ddp else wish


def make_setting(
    config: Config,
    kernels: Kernels,
    card_bytes: int | None,
    workers: int,
    workers_here: int,
    buckets: Sequence[Bucket] = (),
    accumulation: int | None = None,
) -> Setting:
    """What the plan hangs on beside the run.

    Args:
        card_bytes: memory of the smallest card; None: not known.
        buckets: that hold images; none: the data are not prepared yet, and may be of any shape.
        accumulation: passes of a usual step, where the data say it; None: as the configuration says.
    """
    rules, train = config.data.buckets, config.train
    shapes = tuple(buckets) or make_buckets(rules.resolution, rules.min_px, rules.max_px, rules.step_px)
    at_once = workers * train.batch_size_per_gpu
    passes = train.gradient_accumulation_steps or -(-(train.global_batch_size or at_once) // at_once)
    groups = workers // workers_within(config.memory.shard_within, workers, workers_here)
    batches = [factor * train.batch_size_per_gpu for factor in batch_factors(config, shapes)]
    return Setting(
        kernels=kernels,
        workers=workers,
        workers_here=workers_here,
        accumulation=accumulation or passes,
        buckets=tuple(zip(shapes, batches, strict=True)),
        budget=make_budget(config.memory.budget, kernels, card_bytes, workers, groups),
    )

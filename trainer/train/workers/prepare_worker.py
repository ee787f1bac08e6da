"""From a configuration to the settings of `prepare`, and one worker's share of the encoding (with torch)."""

import os
from collections.abc import Callable
from pathlib import Path

from trainer.config.schema import Config
from trainer.config.sections.data.sources import Source
from trainer.data.buckets import BucketRules, OtherResolution
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.prepare.encode import encode_shards, pending_payloads, write_references
from trainer.model_files.run_model import RunModel
from trainer.train.caption_rules import caption_rules, caption_tokenizer, tag_separators

_WRITERS = 8


def prepare_settings(config: Config, model: RunModel) -> PrepareSettings:
    """What decides the prepared data set; reads the weights of the VAE (and of cached text encoders) once."""
    buckets = config.data.buckets
    # A set of images is the same for every VAE: each run encodes with its own.
    vae_fingerprint, scaling_factor, encoders = "of the run", 1.0, None
    if config.data.mode == "latents":
        vae_fingerprint = f"{model.fingerprint('vae')} {config.model.vae_precision}"
        scaling_factor = model.config("vae").get("scaling_factor", 0.18215)
    if config.data.cache_text:
        parts = [model.fingerprint(name) for name in ("text_encoder", "text_encoder_2")]
        encoders = f"{' '.join(parts)} {config.model.text_encoder_precision}"
    return PrepareSettings(
        prepared=config.data.prepared,
        sources=tuple(map(_absolute, config.data.sources)),
        buckets=BucketRules(
            resolution=buckets.resolution,
            min_px=buckets.min_px,
            max_px=buckets.max_px,
            step_px=buckets.step_px,
            no_upscale=buckets.no_upscale,
        ),
        vae=vae_fingerprint,
        scaling_factor=scaling_factor,
        text_encoders=encoders,
        captions=_caption_settings(config) if config.data.cache_text else None,
        validation_fraction=config.data.validation_fraction,
        rows_per_shard=config.data.rows_per_shard,
        mode=config.data.mode,
        limits=config.limits.plain(),
        filters=config.data.filters,
        separators=tag_separators(config),
        also_at=tuple(OtherResolution(other.resolution, other.share) for other in buckets.also_at),
    )


def _caption_settings(config: Config) -> dict[str, object]:
    return config.captions.model_dump(exclude_defaults=True, exclude={"max_empty_fraction"})


def _absolute(source: Source) -> Source:
    """With absolute paths: what is prepared may refer to files, and is to be read from any current directory."""
    paths = {name: value.absolute() for name, value in source if isinstance(value, Path)}
    return source.model_copy(update=paths)


def needs_workers(config: Config) -> bool:
    """Whether the pending shards take more than noting where images or latents lie."""
    return config.data.cache_text or bool(pending_payloads(config.data.prepared) & {"encode", "repack"})


def note_references(config: Config) -> None:
    """Write the pending shards here, where no model is needed."""
    write_references(config.data.prepared, min(_WRITERS, len(os.sched_getaffinity(0))))


def encode_share(config: Config, model: RunModel, part: tuple[int, int] | None = None) -> None:
    """Encode shards beside the other workers until none is left, without a process group: none waits for another.

    Args:
        part: (k, n): of all shards only the k-th of n parts, k from 1.
    """
    import numpy as np
    import torch

    from trainer.data.captions import compose
    from trainer.model.load_weights import load_text_encoders, load_vae
    from trainer.model.vae import ImageEncoder
    from trainer.optim.precision import DTYPES
    from trainer.parallel.comm import init_device

    device = init_device()
    encode: Callable[..., np.ndarray] | None = None
    if "encode" in pending_payloads(config.data.prepared):
        vae = load_vae(model, DTYPES[config.model.vae_precision], device)

        def encode_images(pixels: np.ndarray, draw_seeds: np.ndarray) -> np.ndarray:
            encoder = ImageEncoder(vae, len(pixels))
            return encoder.encode(torch.from_numpy(pixels), torch.from_numpy(draw_seeds)).cpu().numpy()

        encode = encode_images
    encode_text: Callable[..., tuple[np.ndarray, np.ndarray]] | None = None
    if config.data.cache_text:
        dtype = DTYPES[config.model.text_encoder_precision]
        encoders = load_text_encoders(model, dtype, device, config.captions.chunks)
        tokenize = caption_tokenizer(config, model)

        rules = caption_rules(config)  # not random, or the configuration would have been refused

        def encode_captions(records: list[str]) -> tuple[np.ndarray, np.ndarray]:
            ids = torch.from_numpy(tokenize([compose(record, rules, 0, 0) for record in records]))
            with torch.inference_mode():
                text = encoders.encode(ids)
            return text.hidden.float().cpu().numpy(), text.pooled.float().cpu().numpy()

        encode_text = encode_captions
    encode_shards(
        config.data.prepared,
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
        encode,
        encode_text,
        vae_batch_size=config.data.vae_batch_size,
        decode_threads=max(2, config.data.workers),
        part=part or (1, 1),
    )

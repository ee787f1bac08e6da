"""From a configuration to `prepare`'s settings, and one worker's share of the encoding. Imports torch only in the latter."""

import os
from collections.abc import Callable

from trainer.config.schema import Config
from trainer.config.schema import Source as SourceConfig
from trainer.data.buckets import BucketRules
from trainer.data.settings import PrepareSettings
from trainer.data.sources.listing import SOURCE_TYPES, Source
from trainer.model.folder import read_config, vae_folder, weights_fingerprint
from trainer.train.captions import caption_rules


def prepare_settings(config: Config) -> PrepareSettings:
    """What decides the prepared data set; reads the weights of the VAE (and of cached text encoders) once."""
    model, buckets = config.model, config.data.buckets
    vae = vae_folder(model.path, model.vae)
    encoders = None
    if config.data.cache_text:
        parts = [weights_fingerprint(model.path / name) for name in ("text_encoder", "text_encoder_2")]
        encoders = f"{' '.join(parts)} {model.text_encoder_precision}"
    return PrepareSettings(
        prepared=config.data.prepared,
        sources=tuple(map(_source, config.data.sources)),
        buckets=BucketRules(
            resolution=buckets.resolution,
            min_px=buckets.min_px,
            max_px=buckets.max_px,
            step_px=buckets.step_px,
            no_upscale=buckets.no_upscale,
        ),
        vae=f"{weights_fingerprint(vae)} {model.vae_precision}",
        scaling_factor=read_config(vae).get("scaling_factor", 0.18215),
        text_encoders=encoders,
        captions=_caption_settings(config) if config.data.cache_text else None,
        validation_fraction=config.data.validation_fraction,
        rows_per_shard=config.data.rows_per_shard,
    )


def _caption_settings(config: Config) -> dict[str, object]:
    return config.captions.model_dump(exclude_defaults=True, exclude={"max_empty_fraction"})


def _source(entry: SourceConfig) -> Source:
    """The data package's own form of an entry of `data.sources`; the fields are the same."""
    fields = {name: getattr(entry, name) for name in type(entry).model_fields if name != "type"}
    return SOURCE_TYPES[entry.type](**fields)


def encode_share(config: Config) -> None:
    """Encode shards beside the other workers until none is left, without a process group: none waits for another."""
    import numpy as np
    import torch

    from trainer.data.captions import compose
    from trainer.data.encode import encode_shards
    from trainer.dist.comm import init_device
    from trainer.model.load import load_text_encoders, load_vae
    from trainer.model.text import load_tokenizers
    from trainer.model.vae import encode_latents
    from trainer.train.precision import DTYPES

    device = init_device()
    model = config.model
    vae = load_vae(model.path, model.vae, DTYPES[model.vae_precision], device)

    def encode(pixels: np.ndarray, draw_seeds: np.ndarray) -> np.ndarray:
        return encode_latents(vae, torch.from_numpy(pixels).to(device), torch.from_numpy(draw_seeds)).cpu().numpy()

    encode_text: Callable[..., tuple[np.ndarray, np.ndarray]] | None = None
    if config.data.cache_text:
        encoders = load_text_encoders(model.path, DTYPES[model.text_encoder_precision], device)
        tokenize = load_tokenizers(model.path)

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
    )

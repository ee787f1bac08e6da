"""Batches of pixels become the latents that `prepare` would have stored; a VAE that overflows costs that image only."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

from trainer.data.loader import Batch
from trainer.keyed import draw_seed
from trainer.model.latents import encoded_batches
from trainer.model.load_weights import load_vae
from trainer.model.vae import ImageEncoder, encode_latents
from trainer.model_files.run_model import open_model

KEYS = ("photos/a", "photos/b", "photos/c", "", "photos/d")
PHOTOS = [data.astronaut()[64 * i : 64 * i + 64, 96:224] for i in range(5)]


@pytest.fixture(scope="module")
def encoder(model_folder: Path) -> ImageEncoder:
    return ImageEncoder(load_vae(open_model(model_folder), torch.float32, "cpu"), batch_size=2)


def _batch() -> Batch:
    """Four photographs, and padding in the fourth place."""
    seeds = torch.tensor([draw_seed("vae", key) for key in KEYS])
    return Batch(
        latents=None,
        pixels=torch.from_numpy(np.stack(PHOTOS).transpose(0, 3, 1, 2).copy()),
        vae_seeds=seeds,
        input_ids=None,
        text_hidden=None,
        pooled=None,
        time_ids=torch.zeros(5, 6),
        weights=torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0]),
        draw_seeds=seeds,
        keys=KEYS,
        problems=(),
    )


def test_the_latents_that_prepare_stores(encoder: ImageEncoder) -> None:
    (encoded,) = encoded_batches(encoder, [_batch()])
    assert encoded.latents is not None and encoded.pixels is None and encoded.problems == ()
    assert encoded.latents.dtype == torch.float32 and encoded.weights.tolist() == [1, 1, 1, 0, 1]
    for start in (0, 2, 4):  # batch by batch as `prepare` does it
        photos = np.stack(PHOTOS[start : start + 2]).transpose(0, 3, 1, 2)
        pixels = torch.from_numpy(np.ascontiguousarray(photos / np.float32(127.5) - 1))
        seeds = torch.tensor([draw_seed("vae", key) for key in KEYS[start : start + 2]])
        assert torch.equal(encoded.latents[start : start + 2], encode_latents(encoder.vae, pixels, seeds))


def test_batches_of_latents_pass_unchanged(encoder: ImageEncoder) -> None:
    batch = replace(_batch(), latents=torch.zeros(5, 4, 8, 16), pixels=None)
    assert [*encoded_batches(None, [batch]), *encoded_batches(encoder, [batch])] == [batch, batch]


def test_an_image_that_overflows_the_vae_gets_no_weight(model_folder: Path) -> None:
    """Weights near fp16's limit: white overflows, black stays finite."""
    vae = load_vae(open_model(model_folder), torch.float32, "cpu")
    vae.encoder.conv_in.weight.data.mul_(3e38)
    batch = _batch()
    assert batch.pixels is not None
    batch.pixels[:] = 255
    batch.pixels[1:3] = 127  # nearly 0 in -1..1
    vae.encoder.conv_in.bias.data.zero_()
    (encoded,) = encoded_batches(ImageEncoder(vae, 2), [batch])
    assert encoded.latents is not None and encoded.latents.isfinite().all()
    bad = [problem.file for problem in encoded.problems]
    assert "photos/a" in bad and "photos/d" in bad and "" not in bad
    assert encoded.weights.tolist() == [float(key not in bad and key != "") for key in KEYS]
    assert "not finite" in encoded.problems[0].reason

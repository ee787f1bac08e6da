from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.image_processor import VaeImageProcessor

from trainer.model.load_weights import load_vae
from trainer.model.vae import decode_latents, encode_latents
from trainer.model_files.run_model import open_model

SEEDS = torch.tensor([3, 5, 2**62])


@pytest.fixture(scope="module")
def vae(model_folder: Path) -> AutoencoderKL:
    return load_vae(open_model(model_folder), torch.float32, "cpu")


def _pixels() -> torch.Tensor:
    return torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_latents_are_one_unscaled_sample_of_the_posterior(vae: AutoencoderKL) -> None:
    latents = encode_latents(vae, _pixels(), SEEDS)
    assert latents.shape == (3, 4, 6, 8)
    assert latents.dtype == torch.float32
    with torch.no_grad():
        posterior = vae.encode(_pixels()).latent_dist  # pyright: ignore[reportAttributeAccessIssue]
    for row, seed in enumerate(SEEDS.tolist()):
        noise = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(latents[row], posterior.mean[row] + posterior.std[row] * noise)


def test_an_images_latents_depend_on_its_own_seed(vae: AutoencoderKL) -> None:
    latents = encode_latents(vae, _pixels(), SEEDS)
    torch.testing.assert_close(encode_latents(vae, _pixels()[[2, 0]], SEEDS[[2, 0]]), latents[[2, 0]])
    assert not torch.allclose(encode_latents(vae, _pixels()[:1], SEEDS[1:2]), latents[:1])


def test_decoding_equals_the_pipelines_post_processing(vae: AutoencoderKL) -> None:
    latents = encode_latents(vae, _pixels(), SEEDS) * 3
    images = decode_latents(vae, latents)
    assert images.shape == (3, 48, 64, 3)
    assert images.dtype == torch.uint8
    with torch.no_grad():
        decoded = vae.decode(latents).sample  # pyright: ignore[reportAttributeAccessIssue]
    expected = VaeImageProcessor().postprocess(decoded, output_type="np")
    difference = images.float() - torch.from_numpy(expected * 255).round()
    assert difference.abs().max() <= 1  # one image at a time may round differently from a batch
    assert (difference != 0).float().mean() < 0.001

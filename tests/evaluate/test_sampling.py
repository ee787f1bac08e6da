from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.diffusion.prediction import Prediction, edm, epsilon, flow, v_prediction
from trainer.diffusion.schedule import scaled_linear, zero_terminal_snr
from trainer.errors import UserError
from trainer.evaluate.samplers import denoised, euler_steps
from trainer.evaluate.sampling import decoded_images, sample_images
from trainer.model.load_weights import load_text_encoders, load_unet, load_vae
from trainer.model.text import load_tokenizers
from trainer.model_files.run_model import open_model

CPU = torch.device("cpu")
PROMPTS = ["a cat", "the hat that sat", "A photograph of the sea, at night!"]
SEEDS = [7, 8, 9]


@pytest.fixture(scope="module")
def models(model_folder: Path) -> dict[str, Any]:
    return {
        "unet": load_unet(open_model(model_folder), torch.float32, CPU),
        "vae": load_vae(open_model(model_folder), torch.float32, CPU),
        "text_encoders": load_text_encoders(open_model(model_folder), torch.float32, CPU),
        "tokenizer": load_tokenizers(open_model(model_folder).tokenizers),
    }


def drawn(models: dict[str, Any], **changes: Any) -> list[np.ndarray]:
    settings: dict[str, Any] = {
        "prompts": PROMPTS,
        "negative_prompt": "the cat",
        "width_px": 96,
        "height_px": 64,
        "num_steps": 3,
        "guidance_scale": 6.0,
        "seeds": SEEDS,
        "device": CPU,
        "prediction": epsilon(),
        "scaling_factor": 0.13025,
    }
    return [np.asarray(image) for image in sample_images(**(models | settings | changes))]


SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ZERO_TERMINAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers
@pytest.mark.parametrize("num_steps", [1, 4, 28, 500])
def test_euler_steps_are_diffusers(num_steps: int) -> None:
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**SDXL, timestep_spacing="leading", steps_offset=1)
    scheduler.set_timesteps(num_steps)
    timesteps, sigmas = euler_steps(scaled_linear(), num_steps)
    assert timesteps == scheduler.timesteps.tolist()
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=1e-6)
    scheduler = EulerDiscreteScheduler(**SDXL, **ZERO_TERMINAL)
    scheduler.set_timesteps(num_steps)
    timesteps, sigmas = euler_steps(zero_terminal_snr(scaled_linear()), num_steps, trailing=True)
    assert timesteps == scheduler.timesteps.tolist()
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=1e-4)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' schedulers
@pytest.mark.parametrize(
    ("prediction", "scheduler_keys", "guidance_scale", "negative_prompt", "rescale", "zeros"),
    [
        (epsilon(), {"timestep_spacing": "leading", "steps_offset": 1}, 6.0, "the cat", 0.0, False),
        (epsilon(), {"timestep_spacing": "leading", "steps_offset": 1}, 3.0, "", 0.0, True),
        (epsilon(), {"timestep_spacing": "leading", "steps_offset": 1}, 1.0, "", 0.0, False),
        (
            v_prediction(),
            {"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "v_prediction"},
            5.0,
            "",
            0.0,
            False,
        ),
        (v_prediction(with_zero_terminal_snr=True), ZERO_TERMINAL, 5.0, "the cat", 0.7, False),
    ],
    ids=["epsilon", "zeros", "unguided", "v", "zero terminal SNR"],
)
def test_equal_to_diffusers_pipeline(
    models: dict[str, Any],
    model_folder: Path,
    prediction: Prediction,
    scheduler_keys: dict[str, Any],
    guidance_scale: float,
    negative_prompt: str,
    rescale: float,
    zeros: bool,
) -> None:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTokenizer

    pipeline = StableDiffusionXLPipeline(
        scheduler=EulerDiscreteScheduler(**SDXL, **scheduler_keys),
        tokenizer=CLIPTokenizer.from_pretrained(model_folder / "tokenizer"),
        tokenizer_2=CLIPTokenizer.from_pretrained(model_folder / "tokenizer_2"),
        unet=models["unet"],
        vae=models["vae"],
        text_encoder=models["text_encoders"].one,
        text_encoder_2=models["text_encoders"].two,
        add_watermarker=False,
        force_zeros_for_empty_prompt=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    images = drawn(
        models,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        num_steps=4,
        prediction=prediction,
        guidance_rescale=rescale,
        zeros_for_no_text=zeros,
    )
    for prompt, seed, image in zip(PROMPTS, SEEDS, images, strict=True):
        expected = pipeline(
            prompt,
            negative_prompt=negative_prompt or (None if zeros else ""),
            width=96,
            height=64,
            num_inference_steps=4,
            guidance_scale=guidance_scale,
            guidance_rescale=rescale,
            generator=torch.Generator("cpu").manual_seed(seed),
        ).images[0]
        # Rounding to 256 levels may turn the last bit of a float into a level.
        difference = np.abs(image.astype(int) - np.asarray(expected))
        assert difference.max() <= 1 and (difference > 0).mean() < 3e-3
        assert image.shape == (64, 96, 3)
        assert image.std() > 5  # a picture that could differ


@pytest.mark.parametrize("kind", ["flow", "shifted flow", "edm"])
def test_other_samplers_are_diffusers(kind: str) -> None:
    """With a function in place of the network, over all steps."""
    from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

    shift = 3.0 if kind == "shifted flow" else 1.0
    prediction = edm() if kind == "edm" else flow(shift)
    noise = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(1))

    def model(latents: torch.Tensor, timestep: float) -> torch.Tensor:
        return (latents * 1.7 + timestep / 1000).sin() - 0.3 * latents

    found = denoised(prediction, model, noise, 7)
    if kind == "edm":
        scheduler = EDMEulerScheduler(sigma_data=0.5)
        scheduler.set_timesteps(7)
        latents = noise * scheduler.init_noise_sigma
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        # Evenly from 1 on, before the shift, as pipelines of flow models ask for it.
        scheduler.set_timesteps(sigmas=[1 - step / 7 for step in range(7)])
        latents = noise
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep) if kind == "edm" else latents
        latents = scheduler.step(model(seen, float(timestep)), timestep, latents).prev_sample
    torch.testing.assert_close(found, latents, rtol=1e-3, atol=1e-3)


def test_an_image_hangs_on_its_prompt_and_seed_alone(models: dict[str, Any]) -> None:
    alone = drawn(models)
    rank_1_of_2 = drawn(models, prompts=PROMPTS[1::2], seeds=SEEDS[1::2])
    np.testing.assert_array_equal(rank_1_of_2[0], alone[1])
    other_seed = drawn(models, prompts=PROMPTS[:1], seeds=[8])
    other_prompt = drawn(models, prompts=PROMPTS[1:2], seeds=[7])
    assert (other_seed[0] != alone[0]).any()
    assert (other_prompt[0] != alone[0]).any()
    assert drawn(models, prompts=[], seeds=[]) == []


def test_guidance_and_the_negative_prompt_matter_only_above_one(models: dict[str, Any]) -> None:
    first: dict[str, Any] = {"prompts": PROMPTS[:1], "seeds": SEEDS[:1]}
    unguided = drawn(models, guidance_scale=1.0, **first)[0]
    np.testing.assert_array_equal(unguided, drawn(models, guidance_scale=0.0, negative_prompt="the sea", **first)[0])
    assert (unguided != drawn(models, **first)[0]).any()
    assert (drawn(models, **first)[0] != drawn(models, negative_prompt="the sea", **first)[0]).any()


def test_training_goes_on_as_before(models: dict[str, Any]) -> None:
    unet = models["unet"]
    unet.train()
    unet.mid_block.eval()
    before = {name: module.training for name, module in unet.named_modules()}
    state = torch.get_rng_state()
    drawn(models, prompts=PROMPTS[:1], seeds=SEEDS[:1])
    assert {name: module.training for name, module in unet.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    unet.eval()
    with pytest.raises(ValueError, match="shorter"):
        drawn(models, seeds=SEEDS[:1])
    # A backward pass through weights that sampling has used.
    conditioning = {"text_embeds": torch.zeros(1, 24), "time_ids": torch.zeros(1, 6)}
    out = unet(torch.zeros(1, 4, 8, 8), 5, torch.zeros(1, 77, 40), added_cond_kwargs=conditioning)[0]
    out.sum().backward()
    assert unet.conv_in.weight.grad is not None
    unet.zero_grad()


def test_bf16_autocast_draws_nearly_the_same(models: dict[str, Any]) -> None:
    first: dict[str, Any] = {"prompts": PROMPTS[:1], "seeds": SEEDS[:1]}
    exact = drawn(models, **first)[0].astype(int)
    half = drawn(models, autocast_dtype=torch.bfloat16, **first)[0].astype(int)
    assert 0 < np.abs(exact - half).mean() < 0.1 * exact.std()


def test_a_bf16_model_draws_nearly_the_same(models: dict[str, Any], model_folder: Path) -> None:
    first: dict[str, Any] = {"prompts": PROMPTS[:1], "seeds": SEEDS[:1]}
    exact = drawn(models, **first)[0].astype(int)
    unet = load_unet(open_model(model_folder), torch.bfloat16, CPU)
    assert np.abs(exact - drawn({**models, "unet": unet}, **first)[0]).mean() < 0.1 * exact.std()


def test_what_the_sampler_cannot_make_is_the_users_to_mend(models: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="100 x 64 px: width and height must be multiples of 8"):
        drawn(models, width_px=100)
    with pytest.raises(UserError, match="1 to 500 steps"):
        drawn(models, num_steps=501)


def test_decoded_images_are_the_vaes(models: dict[str, Any]) -> None:
    vae = models["vae"]
    latents = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0)).half()
    images = decoded_images(vae, latents)
    assert [(image.mode, image.size) for image in images] == [("RGB", (96, 64))] * 2
    with torch.no_grad():
        expected = vae.decode(latents[1:].float()).sample[0].permute(1, 2, 0)
    levels = Image.fromarray(((expected / 2 + 0.5).clamp(0, 1) * 255).round().byte().numpy())
    np.testing.assert_array_equal(np.asarray(images[1]), np.asarray(levels))

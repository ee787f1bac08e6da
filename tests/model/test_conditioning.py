from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline

from trainer.model.conditioning import time_ids, unet_inputs
from trainer.model.load_weights import load_unet
from trainer.model.text import TextConditioning
from trainer.model_files.run_model import open_model


def test_time_ids_equal_the_pipelines(model_folder: Path) -> None:
    unet = load_unet(open_model(model_folder), torch.float32, "cpu")
    pipeline = StableDiffusionXLPipeline(
        vae=None,  # pyright: ignore[reportArgumentType]
        text_encoder=None,  # pyright: ignore[reportArgumentType]
        text_encoder_2=None,  # pyright: ignore[reportArgumentType]
        tokenizer=None,  # pyright: ignore[reportArgumentType]
        tokenizer_2=None,  # pyright: ignore[reportArgumentType]
        unet=unet,
        scheduler=None,  # pyright: ignore[reportArgumentType]
        add_watermarker=False,
    )
    sizes = ((4001, 2999), (17, 33), (1152, 896))
    expected = pipeline._get_add_time_ids(*sizes, dtype=torch.float32, text_encoder_projection_dim=24)
    ids = time_ids(*sizes, batch_size=3)
    assert ids.shape == (3, 6)
    assert ids.dtype == torch.float32
    assert ids[0].tolist() == [4001, 2999, 17, 33, 1152, 896]
    for row in ids:
        assert torch.equal(row, expected[0])


def test_the_unet_takes_the_inputs_and_heeds_each(model_folder: Path) -> None:
    unet = load_unet(open_model(model_folder), torch.float32, "cpu")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    text = TextConditioning(
        torch.randn(2, 77, 40, generator=generator).half(), torch.randn(2, 24, generator=generator).half()
    )
    ids = time_ids((512, 300), (4, 0), (64, 64), batch_size=2)
    timesteps = torch.tensor([1, 900])
    with torch.no_grad():
        prediction = unet(**unet_inputs(latents, timesteps, text, ids))[0]
        expected = unet(
            latents,
            timesteps,
            encoder_hidden_states=text.hidden.float(),
            added_cond_kwargs={"text_embeds": text.pooled.float(), "time_ids": ids},
        ).sample
        assert prediction.shape == latents.shape
        assert torch.equal(prediction, expected)
        others = [
            unet_inputs(latents, timesteps + 50, text, ids),
            unet_inputs(latents, timesteps, TextConditioning(text.hidden * 2, text.pooled), ids),
            unet_inputs(latents, timesteps, TextConditioning(text.hidden, text.pooled * 2), ids),
            unet_inputs(latents, timesteps, text, ids + 100),
        ]
        for inputs in others:
            assert not torch.equal(unet(**inputs)[0], prediction)

"""A tiny SDXL with the real topology and random weights, in diffusers' folder layout, made without a download.

UNet blocks and transformer depths 1, 2 and 10, two text encoders and CLIP's real tokenizer are as in the
published SDXL 1.0; only the widths differ. No two widths of the text side are equal, so that whoever
confuses them fails.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.model_files.clip_tokenizer import END_TOKEN, write_clip_tokenizer

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

_TEXT_WIDTH_ONE, _TEXT_WIDTH_TWO, _POOLED_WIDTH = 64, 96, 80
_VOCABULARY_SIZE = 49408

_UNET: dict[str, Any] = {
    "sample_size": 32,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [1, 2, 3],  # the number of heads, for all its name; 32 channels each
    "cross_attention_dim": _TEXT_WIDTH_ONE + _TEXT_WIDTH_TWO,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 6 * 256 + _POOLED_WIDTH,
}
# bos, eos and pad are what SDXL's files say; the tokenizers' real ids are 49406, 49407 and 49407 or 0.
_TEXT: dict[str, Any] = {
    "vocab_size": _VOCABULARY_SIZE,
    "max_position_embeddings": 77,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "num_attention_heads": 2,
}
_TEXT_ONE: dict[str, Any] = _TEXT | {
    "hidden_size": _TEXT_WIDTH_ONE,
    "intermediate_size": 4 * _TEXT_WIDTH_ONE,
    "num_hidden_layers": 2,
    "hidden_act": "quick_gelu",
    "projection_dim": _TEXT_WIDTH_ONE,
}
_TEXT_TWO: dict[str, Any] = _TEXT | {
    "hidden_size": _TEXT_WIDTH_TWO,
    "intermediate_size": 4 * _TEXT_WIDTH_TWO,
    "num_hidden_layers": 3,
    "hidden_act": "gelu",
    "projection_dim": _POOLED_WIDTH,
}
_SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "trained_betas": None,
}
_MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def write_tiny_model(
    folder: Path,
    *,
    seed: int = 0,
    vae: AutoencoderKL | None = None,
    captions: Sequence[str] = (),
    tokenizer_from: Path | None = None,
) -> None:
    """Write the model; takes a second or two.

    Args:
        folder: is made; must not exist, or be empty.
        seed: of the random weights.
        vae: a trained one, with latents of the mean variance 1 / 0.13025^2 as in SDXL. Default: an
            untrained one, which blurs.
        captions: what they have in common is taken off the text encoders' outputs, for a UNet learns slowly from small
            differences of large numbers. Default: nothing is.
        tokenizer_from: a tokenizer folder (`vocab.json`, `merges.txt`) to use in place of CLIP's, which is read
            from an installed package.

    Raises:
        UserError: no installed package has CLIP's vocabulary.
    """
    import torch
    from safetensors.torch import save_file

    from trainer.tiny.tiny_vae import make_tiny_vae

    folder.mkdir(parents=True, exist_ok=True)
    for name, pad_token in (("tokenizer", END_TOKEN), ("tokenizer_2", "!")):
        write_clip_tokenizer(folder / name, pad_token, tokenizer_from or (folder / "tokenizer"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make_tiny_unet().save_pretrained(folder / "unet")
        one, two = _make_text_encoders()
    for encoder, name, tokenizer in ((one, "text_encoder", "tokenizer"), (two, "text_encoder_2", "tokenizer_2")):
        if captions:
            _take_off_the_mean(encoder, folder / tokenizer, captions)
        encoder.config.save_pretrained(folder / name)
        # Not by `save_pretrained`, which draws a progress bar of its own.
        save_file(encoder.state_dict(), folder / name / "model.safetensors", metadata={"format": "pt"})
    (make_tiny_vae(seed) if vae is None else vae).save_pretrained(folder / "vae")
    _write_json(folder / "scheduler" / "scheduler_config.json", _SCHEDULER)
    _write_json(folder / "model_index.json", _MODEL_INDEX)


def make_tiny_unet() -> UNet2DConditionModel:
    """The UNet with weights from torch's global generator; latents [B, 4, h, w] of 32 x 32 at 256 x 256 px."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel(**_UNET)


def _make_text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Both encoders with random weights whose outputs tell captions apart, as those of a trained CLIP do.

    As CLIP begins its training, the end token hardly hears of the words before it. So words are large here,
    positions and padding small, and attention has three times its share: captions of one subject come out alike.
    """
    import torch
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    one = CLIPTextModel(CLIPTextConfig(**_TEXT_ONE))
    two = CLIPTextModelWithProjection(CLIPTextConfig(**_TEXT_TWO))
    with torch.no_grad():
        for encoder in (one, two):
            for name, weight in encoder.named_parameters():
                if name.endswith("token_embedding.weight"):
                    weight.normal_(std=4.0)
                    weight[[0, -1]] *= 0.1  # what fills up short texts
                elif name.endswith("position_embedding.weight"):
                    weight.normal_(std=0.2)
                elif name.endswith("self_attn.out_proj.weight"):
                    weight.mul_(12.0)
                elif name.endswith("mlp.fc2.weight"):
                    weight.mul_(4.0)
        two.text_projection.weight.mul_(3.0)
    return one, two


def _take_off_the_mean(
    encoder: CLIPTextModel | CLIPTextModelWithProjection, tokenizer_folder: Path, captions: Sequence[str]
) -> None:
    """Fold minus the mean over captions into the biases before the outputs that SDXL takes."""
    import torch
    from transformers.models.clip.tokenization_clip import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    ids = torch.tensor(tokenizer(list(captions), padding="max_length", max_length=77)["input_ids"])
    # By the end of their names: how deep they lie differs between versions of transformers.
    last_but_one = f"layers.{encoder.config.num_hidden_layers - 2}.mlp.fc2.bias"
    (hidden_bias,) = (weight for name, weight in encoder.named_parameters() if name.endswith(last_but_one))
    (pooled_bias,) = (weight for name, weight in encoder.named_parameters() if name.endswith("final_layer_norm.bias"))
    with torch.no_grad():
        hidden_bias -= encoder(ids, output_hidden_states=True).hidden_states[-2][:, 1:].mean((0, 1))
        ends = ids.argmax(dim=1)
        pooled_bias -= encoder(ids).last_hidden_state[torch.arange(len(ids)), ends].mean(0)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

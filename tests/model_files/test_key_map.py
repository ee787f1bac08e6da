"""The table of names against diffusers' own conversion of single files, at full size without memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.model_files.diffusers_folder import read_config
from trainer.model_files.key_map import COMPONENTS, LOGIT_SCALE, POSITION_IDS, block_of, single_file_keys
from trainer.model_files.presets import preset
from trainer.model_files.single_file import from_file, logit_scale, position_ids, to_file
from trainer.tiny.tiny_model import write_tiny_model

MAKERS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {
    "unet": UNet2DConditionModel.from_config,
    "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
}


def make_modules(configs: Mapping[str, dict[str, Any]]) -> dict[str, nn.Module]:
    with init_empty_weights():
        return {name: MAKERS[name](configs[name]) for name in COMPONENTS}


def file_tensors(configs: Mapping[str, dict[str, Any]], modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    states = {name: module.state_dict() for name, module in modules.items()}
    keys = single_file_keys(configs)
    return {entry.file_name: to_file(entry, [states[entry.component][name] for name in entry.names]) for entry in keys}


def converted_by_diffusers(
    tensors: dict[str, Tensor], configs: Mapping[str, dict[str, Any]], modules: dict[str, nn.Module]
) -> dict[str, dict[str, Tensor]]:
    clip = convert_ldm_clip_checkpoint(dict(tensors))
    prefix = "conditioner.embedders.1.model."
    return {
        "unet": convert_ldm_unet_checkpoint(dict(tensors), configs["unet"]),
        "vae": convert_ldm_vae_checkpoint(dict(tensors), configs["vae"]),
        "text_encoder": {name.removeprefix("text_model."): tensor for name, tensor in clip.items()},
        "text_encoder_2": convert_open_clip_checkpoint(modules["text_encoder_2"], dict(tensors), prefix),
    }


def tiny_configs(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: read_config(folder / name) for name in COMPONENTS}


@pytest.fixture(scope="module")
def tiny_sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_tiny_model(folder)
    return folder


@pytest.mark.parametrize("kind", [pytest.param("sdxl", marks=pytest.mark.e2e), "tiny", "small"])
def test_names_and_shapes_are_those_that_diffusers_expects(kind: str, model_folder: Path, tiny_sdxl: Path) -> None:
    if kind == "sdxl":
        configs = {name: preset(name) for name in COMPONENTS}
    else:
        configs = tiny_configs(tiny_sdxl if kind == "tiny" else model_folder)
    modules = make_modules(configs)
    tensors = file_tensors(configs, modules)
    for name, converted in converted_by_diffusers(tensors, configs, modules).items():
        expected = {key: tensor.shape for key, tensor in modules[name].state_dict().items()}
        assert {key: tensor.shape for key, tensor in converted.items()} == expected, name


def test_the_published_layout_has_2515_tensors() -> None:
    configs = {name: preset(name) for name in COMPONENTS}
    keys = single_file_keys(configs)
    names = [entry.file_name for entry in keys] + [POSITION_IDS, LOGIT_SCALE]
    assert len(names) == len(set(names)) == 2515
    prefixes = ("model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.", "conditioner.embedders.1.")
    assert [sum(name.startswith(prefix) for name in names) for prefix in prefixes] == [1680, 248, 197, 390]
    tensors = file_tensors(configs, make_modules(configs))
    # Known of the published file, not of the table.
    for name, shape in {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.5.2.conv.weight": (640, 640, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "first_stage_model.decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
    }.items():
        assert tuple(tensors[name].shape) == shape, name
    count = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("model."))
    assert count == 2_567_463_684
    assert position_ids().tolist() == [list(range(77))]
    assert logit_scale(torch.float16).shape == ()


def test_values_are_those_that_diffusers_converts_and_come_back(model_folder: Path) -> None:
    configs = tiny_configs(model_folder)
    modules = {name: MAKERS[name](configs[name]) for name in COMPONENTS}
    tensors = file_tensors(configs, modules)
    converted = converted_by_diffusers(tensors, configs, modules)
    read: dict[str, dict[str, Tensor]] = {name: {} for name in COMPONENTS}
    for entry in single_file_keys(configs):
        read[entry.component].update(from_file(entry, tensors[entry.file_name]))
    for name, module in modules.items():
        state = module.state_dict()
        assert state.keys() == read[name].keys() == converted[name].keys()
        for key, tensor in state.items():
            assert torch.equal(read[name][key], tensor) and torch.equal(converted[name][key], tensor), key


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("model.diffusion_model.input_blocks.4.1.transformer_blocks.0.norm1.weight", "input_blocks.4.1"),
        ("model.diffusion_model.input_blocks.0.0.weight", "input_blocks.0.0"),
        ("model.diffusion_model.middle_block.1.proj_in.weight", "middle_block.1"),
        ("model.diffusion_model.output_blocks.2.2.conv.bias", "output_blocks.2.2"),
        ("model.diffusion_model.label_emb.0.2.bias", "label_emb"),
        ("model.diffusion_model.out.0.weight", "out"),
        ("first_stage_model.encoder.down.1.block.0.conv1.weight", "vae.encoder.down.1"),
        ("first_stage_model.decoder.mid.attn_1.q.weight", "vae.decoder.mid"),
        ("first_stage_model.decoder.conv_out.bias", "vae.decoder.conv_out"),
        ("first_stage_model.quant_conv.bias", "vae.quant_conv"),
        (POSITION_IDS, "text_encoder_1.embeddings"),
        ("conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp.fc1.bias", "text_encoder_1.layers.3"),
        ("conditioner.embedders.1.model.transformer.resblocks.31.ln_1.bias", "text_encoder_2.layers.31"),
        ("conditioner.embedders.1.model.positional_embedding", "text_encoder_2.embeddings"),
        ("conditioner.embedders.1.model.text_projection", "text_encoder_2.text_projection"),
        ("v_pred", "other"),
    ],
)
def test_blocks(name: str, block: str) -> None:
    assert block_of(name) == block


def test_every_tensor_has_a_block() -> None:
    blocks = {block_of(entry.file_name) for entry in single_file_keys({name: preset(name) for name in COMPONENTS})}
    assert "other" not in blocks
    # 9 input blocks, 4 with a transformer; 9 output blocks, 6 with one, 2 upsamplers; 3 in the middle, 3 outside.
    assert sum(not name.startswith(("vae.", "text_")) for name in blocks) == 9 + 4 + 9 + 6 + 2 + 3 + 3

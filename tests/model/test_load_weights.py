import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from trainer.errors import UserError
from trainer.model.load_weights import load_text_encoders, load_unet, load_vae
from trainer.model_files.run_model import open_model


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def _rewrite(file: Path, change: Any) -> None:
    save_file(change(load_file(file)), file)


def _assert_same_weights(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    wanted = expected.state_dict()
    assert list(model.state_dict()) == list(wanted)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    buffers = dict(expected.named_buffers())
    assert dict(model.named_buffers()).keys() == buffers.keys()
    for name, tensor in model.named_buffers():
        assert torch.equal(tensor, buffers[name]), name


def test_same_models_as_the_libraries_own_loading(model_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = torch.get_rng_state()
    unet = load_unet(open_model(model_folder), torch.float32, "cpu")
    vae = load_vae(open_model(model_folder), torch.float32, "cpu")
    encoders = load_text_encoders(open_model(model_folder), torch.float32, "cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert capfd.readouterr() == ("", "")
    _assert_same_weights(unet, UNet2DConditionModel.from_pretrained(model_folder / "unet"))
    _assert_same_weights(vae, AutoencoderKL.from_pretrained(model_folder / "vae"))
    _assert_same_weights(encoders.one, CLIPTextModel.from_pretrained(model_folder / "text_encoder"))
    _assert_same_weights(encoders.two, CLIPTextModelWithProjection.from_pretrained(model_folder / "text_encoder_2"))
    assert all(parameter.requires_grad for parameter in unet.parameters())
    for frozen in (vae, encoders.one, encoders.two):
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        assert not frozen.training


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_value_that_is_not_finite_is_refused_with_its_name(copied: Path, value: float, dtype: torch.dtype) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        tensors["mid_block.resnets.0.conv1.weight"].view(-1)[77] = value
        return tensors

    _rewrite(copied / "unet" / "diffusion_pytorch_model.safetensors", spoil)
    with pytest.raises(UserError, match=r"unet's mid_block\.resnets\.0\.conv1\.weight holds NaN or infinite values"):
        load_unet(open_model(copied), torch.float32, "cpu")


def test_weights_take_the_asked_dtype_and_own_their_memory(model_folder: Path) -> None:
    unet = load_unet(open_model(model_folder), torch.bfloat16, "cpu")
    stored = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, parameter in unet.named_parameters():
        assert torch.equal(parameter, stored[name].bfloat16())
        assert parameter.untyped_storage().nbytes() == parameter.numel() * 2
    encoders = load_text_encoders(open_model(model_folder), torch.float16, "cpu")
    assert {tensor.dtype for tensor in encoders.two.state_dict().values()} == {torch.float16}


def test_saving_and_loading_text_encoders_goes_round(model_folder: Path, copied: Path) -> None:
    encoders = load_text_encoders(open_model(model_folder), torch.float32, "cpu")
    encoders.one.save_pretrained(copied / "text_encoder")
    encoders.two.save_pretrained(copied / "text_encoder_2")
    again = load_text_encoders(open_model(copied), torch.float32, "cpu")
    _assert_same_weights(again.one, encoders.one)
    _assert_same_weights(again.two, encoders.two)


@pytest.mark.parametrize("with_prefix", [True, False])
def test_text_encoder_names_with_and_without_prefix(model_folder: Path, copied: Path, with_prefix: bool) -> None:
    def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        bare = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
        renamed = {f"text_model.{name}": tensor for name, tensor in bare.items()} if with_prefix else bare
        return {**renamed, "text_model.embeddings.position_ids": torch.arange(77)[None]}

    _rewrite(copied / "text_encoder" / "model.safetensors", rename)
    encoders = load_text_encoders(open_model(copied), torch.float32, "cpu")
    _assert_same_weights(encoders.one, load_text_encoders(open_model(model_folder), torch.float32, "cpu").one)


def test_old_attention_names_in_the_vae(model_folder: Path, copied: Path) -> None:
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        for new_name, old_name in old.items():
            weights = {name.replace(f".{new_name}.", f".{old_name}."): tensor for name, tensor in weights.items()}
        assert any("proj_attn" in name for name in weights)
        return weights

    _rewrite(copied / "vae" / "diffusion_pytorch_model.safetensors", rename)
    vae = load_vae(open_model(copied), torch.float32, "cpu")
    _assert_same_weights(vae, load_vae(open_model(model_folder), torch.float32, "cpu"))


def test_shards_and_fp16_variant(model_folder: Path, copied: Path) -> None:
    unet = load_unet(open_model(model_folder), torch.float32, "cpu")
    (copied / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet.save_pretrained(copied / "unet", max_shard_size="200KB")
    assert len(list((copied / "unet").glob("*.safetensors"))) > 1
    _assert_same_weights(load_unet(open_model(copied), torch.float32, "cpu"), unet)

    for file in (copied / "unet").glob("diffusion_pytorch_model*"):
        file.unlink()
    unet.half().save_pretrained(copied / "unet", variant="fp16")
    assert not (copied / "unet" / "diffusion_pytorch_model.safetensors").exists()
    _assert_same_weights(load_unet(open_model(copied), torch.float16, "cpu"), unet)


def test_a_vae_of_ones_own(model_folder: Path, copied: Path, tmp_path: Path) -> None:
    _rewrite(
        copied / "vae" / "diffusion_pytorch_model.safetensors",
        lambda weights: {name: tensor + 1 for name, tensor in weights.items()},
    )
    own = load_vae(open_model(model_folder, copied / "vae"), torch.float32, "cpu")
    assert torch.equal(own.quant_conv.weight, load_vae(open_model(copied), torch.float32, "cpu").quant_conv.weight)
    assert not torch.equal(
        own.quant_conv.weight, load_vae(open_model(model_folder), torch.float32, "cpu").quant_conv.weight
    )
    assert torch.equal(
        load_vae(open_model(model_folder, copied), torch.float32, "cpu").quant_conv.weight, own.quant_conv.weight
    )


def test_weights_that_do_not_fit_the_configuration(copied: Path) -> None:
    file = copied / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)

    save_file({name: tensor for name, tensor in whole.items() if name != "conv_in.bias"}, file)
    with pytest.raises(UserError, match=r"lack 1 tensors .* such as conv_in\.bias"):
        load_unet(open_model(copied), torch.float32, "cpu")

    save_file({**whole, "extra.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"hold 1 tensors .* such as extra\.weight"):
        load_unet(open_model(copied), torch.float32, "cpu")

    save_file({**whole, "conv_in.bias": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=r"conv_in\.bias has shape \[3\], and its configuration asks for \[16\]"):
        load_unet(open_model(copied), torch.float32, "cpu")


def test_the_unets_saved_configuration_is_the_folders(model_folder: Path, tmp_path: Path) -> None:
    load_unet(open_model(model_folder), torch.float32, "cpu").save_pretrained(tmp_path)
    saved, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path, model_folder / "unet"))
    assert saved == original

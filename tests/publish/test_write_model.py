"""Single files and folders that are written, against diffusers' and transformers' own reading."""

import hashlib
import json
import math
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.errors import UserError
from trainer.model.conditioning import time_ids, unet_inputs
from trainer.model.load_weights import load_text_encoders, load_unet, load_vae
from trainer.model.text import TextEncoders
from trainer.model_files.components import Component, ComponentTensor
from trainer.model_files.header import read_header
from trainer.model_files.key_map import COMPONENTS
from trainer.model_files.model_source import find_source, open_component
from trainer.model_files.presets import preset
from trainer.model_files.run_model import open_model
from trainer.publish.write_model import Precision, file_metadata, plan_single_file, write_folder, write_single_file
from trainer.tiny.tiny_model import write_tiny_model

SAME = Precision(None, None)
HALF = Precision(torch.float16, torch.float16)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    write_tiny_model(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tiny: Path) -> Path:
    return export(tiny, tiny.parent / "exported.safetensors")


def parts_of(model: Path) -> dict[str, Component]:
    return {name: open_component(find_source(model), name) for name in COMPONENTS}


def export(model: Path, out: Path, precision: Precision = SAME, **options: Any) -> Path:
    parts = parts_of(model)
    write_single_file(out, plan_single_file(parts, precision, **options), file_metadata(parts))
    return out


def export_folder(model: Path, out: Path, tokenizers_of: Path, precision: Precision = SAME) -> Path:
    tokenizers = (tokenizers_of / "tokenizer", tokenizers_of / "tokenizer_2")
    write_folder(out, parts_of(model), precision, preset("scheduler"), tokenizers)
    return out


def data_of(path: Path) -> bytes:
    return path.read_bytes()[read_header(path).data_begin :]


def assert_same_model(found: torch.nn.Module, wanted: torch.nn.Module) -> None:
    of_found, of_wanted = found.state_dict(), wanted.state_dict()
    assert of_found.keys() == of_wanted.keys()
    assert all(torch.equal(of_found[name], tensor) for name, tensor in of_wanted.items())


def open_with_diffusers(path: Path, config: Path) -> StableDiffusionXLPipeline:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries about themselves
        if path.is_dir():
            return StableDiffusionXLPipeline.from_pretrained(path, local_files_only=True)
        return StableDiffusionXLPipeline.from_single_file(path, config=str(config), local_files_only=True)


@pytest.mark.e2e
def test_diffusers_opens_the_file_with_the_outputs_of_our_loader(tiny: Path, exported: Path) -> None:
    theirs = open_with_diffusers(exported, tiny)
    model, again = open_model(tiny), open_model(exported)
    unet, encoders = load_unet(model, torch.float32, "cpu"), load_text_encoders(model, torch.float32, "cpu")
    input_ids = torch.randint(0, 49405, (2, 2, 1, 77))
    input_ids[..., 20:] = 49407
    latents, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([3, 900])
    outputs = []
    with torch.inference_mode():
        for of_unet, of_encoders in (
            (unet, encoders),
            (theirs.unet.eval(), TextEncoders(theirs.text_encoder.eval(), theirs.text_encoder_2.eval())),
            (
                load_unet(open_model(exported), torch.float32, "cpu"),
                load_text_encoders(open_model(exported), torch.float32, "cpu"),
            ),
        ):
            text = of_encoders.encode(input_ids)
            sizes = time_ids((64, 64), (0, 0), (64, 64), 2)
            outputs.append((text.hidden, text.pooled, of_unet(**unet_inputs(latents, timesteps, text, sizes))[0]))
    for ours, others, again in zip(*outputs, strict=True):
        assert torch.equal(ours, others) and torch.equal(ours, again)
    assert_same_model(theirs.vae, load_vae(open_model(tiny), torch.float32, "cpu"))


def test_folder_to_file_to_folder_to_file_bit_for_bit(model_folder: Path, tmp_path: Path) -> None:
    exported = export(model_folder, tmp_path / "exported.safetensors")
    folder = export_folder(exported, tmp_path / "folder", model_folder)
    again = export(folder, tmp_path / "again.safetensors")
    assert data_of(again) == data_of(exported)
    opened = open_with_diffusers(folder, folder)
    assert_same_model(opened.unet, UNet2DConditionModel.from_pretrained(model_folder / "unet"))
    assert_same_model(opened.vae, AutoencoderKL.from_pretrained(model_folder / "vae"))
    assert_same_model(opened.text_encoder, CLIPTextModel.from_pretrained(model_folder / "text_encoder"))
    assert_same_model(
        opened.text_encoder_2, CLIPTextModelWithProjection.from_pretrained(model_folder / "text_encoder_2")
    )
    stored = read_header(folder / "text_encoder" / "model.safetensors").tensors
    assert all(name.startswith("text_model.") for name in stored)  # as published, for older tools
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.safetensors", "exported.safetensors", "folder"]


def test_values_of_half_precision_files_survive(model_folder: Path, tmp_path: Path) -> None:
    half = export(model_folder, tmp_path / "half.safetensors", Precision(torch.float16, torch.bfloat16))
    dtypes = {entry.dtype for entry in read_header(half).tensors.values()}
    assert dtypes == {"F16", "BF16", "I64"}
    folder = export_folder(half, tmp_path / "folder", model_folder)
    assert data_of(export(folder, tmp_path / "again.safetensors")) == data_of(half)
    wanted = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    found = dict(load_unet(open_model(half), torch.float16, "cpu").named_parameters())
    assert all(torch.equal(found[name], tensor.half()) for name, tensor in wanted.items())


def test_the_hash_in_the_metadata_is_that_of_the_data(model_folder: Path, tmp_path: Path) -> None:
    exported = export(model_folder, tmp_path / "exported.safetensors")
    metadata = read_header(exported).metadata
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data_of(exported)).hexdigest()
    assert json.loads(metadata["sdxl_train.configs"]).keys() == set(COMPONENTS)


def test_markers_and_the_orientation_of_the_text_projection(model_folder: Path, tmp_path: Path) -> None:
    name = "conditioner.embedders.1.model.text_projection"
    weight = load_file(model_folder / "text_encoder_2" / "model.safetensors")["text_projection.weight"]
    assert torch.equal(load_file(export(model_folder, tmp_path / "a.safetensors"))[name], weight.T)
    options = {"markers": ("v_pred", "ztsnr"), "text_projection": "kohya"}
    kohya = load_file(export(model_folder, tmp_path / "kohya.safetensors", **options))
    assert torch.equal(kohya[name], weight)
    assert kohya["v_pred"].numel() == kohya["ztsnr"].numel() == 0


def test_what_fp16_cannot_hold_is_named_and_nothing_is_written(model_folder: Path, tmp_path: Path) -> None:
    folder = export_folder(model_folder, tmp_path / "folder", model_folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"][0, 0, 0, 0] = -81920.0
    tensors["conv_out.bias"][0] = 70000.0
    save_file(tensors, file)
    with pytest.raises(UserError) as caught:
        export(folder, tmp_path / "a.safetensors", HALF)
    (line,) = caught.value.lines
    assert "input_blocks.0.0.weight (up to 81,920), model.diffusion_model.out.2.bias (up to 70,000): beyond" in line
    export(folder, tmp_path / "bf16.safetensors", Precision(torch.bfloat16, torch.bfloat16))
    tensors["conv_in.bias"][0] = math.nan
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"input_blocks\.0\.0\.bias: NaN or infinite"):
        export(folder, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=r"conv_in\.bias: NaN"):
        export_folder(folder, tmp_path / "b", model_folder)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "bf16.safetensors"}


def test_the_full_size_layout_is_the_published_one() -> None:
    """Counts of tensors and parameters are those of the published base model; shapes follow from its configuration."""
    with torch.device("meta"):
        modules = {
            "unet": UNet2DConditionModel.from_config(preset("unet")),
            "vae": AutoencoderKL.from_config(preset("vae")),
            "text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(preset("text_encoder"))),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig.from_dict(preset("text_encoder_2"))),
        }
    parts = {}
    for name, module in modules.items():
        tensors = {
            own: ComponentTensor("F32", tensor, lambda: torch.empty(0)) for own, tensor in module.state_dict().items()
        }
        parts[name] = Component(name, Path(), preset(name), tensors)
        used = {own for entry in plan_names(parts[name]) for own in entry}
        assert used == tensors.keys()
    specs = {tensor.spec.name: tensor.spec for tensor in plan_single_file(parts, HALF)}
    assert file_metadata(parts) == {"format": "pt"}
    counts: dict[str, list[int]] = {}
    for spec in specs.values():
        top = ".".join(spec.name.split(".")[: 2 if spec.name.startswith("conditioner") else 1])
        embedder = spec.name.split(".")[2] if spec.name.startswith("conditioner") else ""
        found = counts.setdefault(top + embedder, [0, 0])
        found[0] += 1
        found[1] += math.prod(spec.shape)
    assert counts == {
        "model": [1680, 2_567_463_684],
        "first_stage_model": [248, 83_653_863],
        "conditioner.embedders0": [197, 123_060_480 + 77],
        "conditioner.embedders1": [390, 694_659_840 + 1],
    }
    assert len(specs) == 2515
    published = {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight": (640, 2048),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "model.diffusion_model.output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "model.diffusion_model.output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "first_stage_model.decoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        "first_stage_model.quant_conv.weight": (8, 8, 1, 1),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight": (3840, 1280),
        "conditioner.embedders.1.model.positional_embedding": (77, 1280),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.logit_scale": (),
    }
    assert {name: specs[name].shape for name in published} == published


def plan_names(part: Component) -> list[tuple[str, ...]]:
    from trainer.model_files.key_map import single_file_keys

    return [entry.names for entry in single_file_keys({part.name: part.config})]


_MEASURE = """
    import resource, sys
    from pathlib import Path
    import torch
    from trainer.publish.write_model import Precision, file_metadata, plan_single_file, write_single_file
    from trainer.model_files.model_source import find_source, open_component

    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    parts = {"unet": open_component(find_source(model), "unet")}
    before = peak()
    write_single_file(out, plan_single_file(parts, Precision(torch.float16, None)), file_metadata(parts))
    print(before, peak())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """1.5 GB of fp32 weights, the largest tensor 19 MB: at most twice that and 100 MB more."""
    from trainer.model_files.tensor_file import TensorSpec, write_tensor_file
    from trainer.tiny.tiny_model import _UNET

    config = _UNET | {"block_out_channels": (128, 256, 512), "cross_attention_dim": 512}
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    (tmp_path / "unet").mkdir()
    unet.save_config(tmp_path / "unet")
    specs = [TensorSpec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in unet.state_dict().items()]
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    write_tensor_file(file, specs, (torch.zeros(spec.shape) for spec in specs), {})
    assert file.stat().st_size > 1e9
    command = [sys.executable, "-c", textwrap.dedent(_MEASURE), str(tmp_path), str(tmp_path / "out.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    largest = max(spec.num_bytes for spec in specs) / 2**20
    print(f"{file.stat().st_size / 1e9:.2f} GB exported: {after - before:.0f} MiB, largest tensor {largest:.0f} MiB")
    assert after - before < 2 * largest + 100

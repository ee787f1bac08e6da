"""What files and folders are said to be: true shapes over files whose data are holes, small files, hostile ones."""

import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from trainer.model_files.examine.identify import KINDS, identify, wrong_model_line
from trainer.model_files.header import DTYPE_BITS, HeaderFault, read_header

UNET, CLIP_L, CLIP_G = (
    "model.diffusion_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
)


def write_holes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str] | None = None, dtype: str = "F16"
) -> Path:
    """A safetensors file of true size whose data take no room on the disk."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name, shape in shapes.items():
        num_bytes = DTYPE_BITS[dtype] // 8
        for size in shape:
            num_bytes *= size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + num_bytes]}
        place += num_bytes
    text = json.dumps(header).encode()
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + place)
    return path


def unet(channels: int = 4, context: int = 2048, vector: int | None = 2816, deepest: int = 10) -> dict[str, tuple]:
    """The tensors of a single file's UNet by which models differ, in their true shapes."""
    shapes: dict[str, tuple] = {
        f"{UNET}input_blocks.0.0.weight": (320, channels, 3, 3),
        f"{UNET}output_blocks.0.0.in_layers.2.weight": (1280, 2560, 3, 3),
    }
    levels = {4: 2, 5: 2, 7: deepest, 8: deepest} if vector else {1: 1, 2: 1, 4: 1, 5: 1, 7: 1, 8: 1}
    for block, depth in levels.items():
        for layer in range(depth):
            shapes[f"{UNET}input_blocks.{block}.1.transformer_blocks.{layer}.attn2.to_k.weight"] = (640, context)
    if vector:
        shapes[f"{UNET}label_emb.0.0.weight"] = (1280, vector)
    return shapes


VAE = {
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
    "first_stage_model.decoder.conv_out.weight": (3, 128, 3, 3),
}
L = {CLIP_L + "text_model.embeddings.token_embedding.weight": (49408, 768)}
G = {CLIP_G + "token_embedding.weight": (49408, 1280)}
BASE = {**unet(), **VAE, **L, **G}
LORA = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_down.weight": (32, 2048),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.lora_up.weight": (640, 32),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k.alpha": (),
}
PEFT = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (8, 768),
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": (320, 8),
}
DIFFUSERS_UNET = {
    "conv_in.weight": (320, 4, 3, 3),
    "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
    "up_blocks.0.resnets.0.conv1.weight": (1280, 2560, 3, 3),
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
    "add_embedding.linear_1.weight": (1280, 2816),
}
FILES = {
    "base": (BASE, "sdxl", "an SDXL base model"),
    "no vae": ({**unet(), **L, **G}, "sdxl", "an SDXL base model without its VAE"),
    "unet only": (unet(), "unet", "the UNet alone of an SDXL base model, without VAE and text encoders"),
    "refiner": (
        {**unet(context=1280, vector=2560, deepest=4), "conditioner.embedders.0.model.ln_final.weight": (1280,)},
        "sdxl-refiner",
        "the SDXL refiner",
    ),
    "inpainting": ({**unet(channels=9), **VAE, **L, **G}, "sdxl-inpainting", "an SDXL inpainting model"),
    "SSD-1B": ({**unet(deepest=4), **L, **G}, "sdxl-other", "a relative of SDXL with transformer depths (0, 2, 4"),
    "Kolors": ({**unet(vector=5632), **VAE}, "sdxl-other", "a relative of SDXL (text conditioning 2048, vector 5632"),
    "SD 1": (unet(context=768, vector=None), "unet", "the UNet alone of a Stable Diffusion 1 model"),
    "SD 1.5": (
        {**unet(context=768, vector=None), **VAE, "cond_stage_model.transformer.text_model.x": (768,)},
        "sd1",
        "a Stable Diffusion 1 model",
    ),
    "SD 1.5 inpainting": (
        {**unet(9, 768, None), **VAE, "cond_stage_model.transformer.text_model.x": (768,)},
        "sd1-inpainting",
        "an inpainting model of Stable Diffusion 1 (9 input channels)",
    ),
    "SD 2.1": (
        {**unet(context=1024, vector=None), **VAE, "cond_stage_model.model.ln_final.weight": (1024,)},
        "sd2",
        "a Stable Diffusion 2 model",
    ),
    "SD 3": ({UNET + "joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)}, "sd3", "a Stable Diffusion 3 model"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072)}, "flux", "a Flux model"),
    "kohya LoRA": (LORA, "lora", "a LoRA for SDXL (kohya, rank 32)"),
    "PEFT LoRA": (PEFT, "lora", "a LoRA for Stable Diffusion 1 (PEFT, rank 8)"),
    "LoHa": ({"lora_unet_mid_block.hada_w1_a": (4, 320)}, "lora", "a LoRA (LyCORIS LoHa)"),
    "LoKr": ({"lora_unet_mid_block.lokr_w1": (4, 4)}, "lora", "a LoRA (LyCORIS LoKr)"),
    "ControlNet": ({"controlnet_cond_embedding.conv_in.weight": (16, 3, 3, 3)}, "controlnet", "a ControlNet"),
    "IP-Adapter": ({"image_proj.norm.bias": (9,), "ip_adapter.1.to_k.weight": (2,)}, "adapter", "an IP-Adapter"),
    "SDXL embedding": ({"clip_g": (4, 1280), "clip_l": (4, 768)}, "embedding", "a textual inversion for SDXL (4"),
    "SD 1 embedding": ({"emb_params": (8, 768)}, "embedding", "a textual inversion for Stable Diffusion 1 (8 tokens)"),
    "VAE": ({name.removeprefix("first_stage_model."): shape for name, shape in VAE.items()}, "vae", "a VAE alone (4 "),
    "VAE with prefix": (VAE, "vae", "a VAE alone (4 "),
    "diffusers UNet": (DIFFUSERS_UNET, "unet", "the UNet alone of an SDXL base model, in diffusers' names"),
    "CLIP-L": (
        {"text_model.encoder.layers.0.mlp.fc1.bias": (3072,), "text_model.embeddings.token_embedding.weight": (2, 768)},
        "text-encoder",
        "a CLIP text encoder alone (CLIP-L",
    ),
    "T5": ({"encoder.block.0.layer.0.SelfAttention.k.weight": (4096, 4096)}, "text-encoder", "a T5 text encoder"),
    "language model": ({"model.layers.0.self_attn.q_proj.weight": (4096, 4096)}, "language-model", "a language model"),
    "ESRGAN": ({"model.1.sub.0.RDB1.conv1.0.weight": (32, 64, 3, 3)}, "upscaler", "an image upscaler"),
    "unknown": ({"a.b": (3,), "c": (300, 5)}, "not-a-model", "a safetensors file of no model known here (2 tens"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_safetensors_files_of_true_shapes(name: str, tmp_path: Path) -> None:
    shapes, kind, description = FILES[name]
    found = identify(write_holes(tmp_path / "file.safetensors", shapes))
    assert (found.kind, found.description[: len(description)]) == (kind, description)
    assert kind in KINDS


def test_a_lora_s_metadata_name_its_base(tmp_path: Path) -> None:
    shapes = {"lora_unet_mid_block_resnets_0_conv1.lora_down.weight": (16, 1280, 3, 3)}
    path = write_holes(tmp_path / "l.safetensors", shapes, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert identify(path).description == "a LoRA for SDXL (kohya, rank 16)"


def test_the_refusal_is_one_line(tmp_path: Path) -> None:
    path = write_holes(tmp_path / "l.safetensors", LORA)
    assert wrong_model_line("model.path", path, identify(path)) == (
        f"model.path: {path} is a LoRA for SDXL (kohya, rank 32); "
        "wanted SDXL base (one .safetensors file or a diffusers folder)"
    )


def _torch_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images/1.png", b"x")


OTHER_FILES = {
    "empty": (b"", "empty", "an empty file"),
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 6938040682\n",
        "lfs-pointer",
        "a git-lfs pointer (the file itself has 6,938,040,682 bytes)",
    ),
    "html": (
        b"<!DOCTYPE html>\n<html><head><title>Just a\n moment...</title>",
        "html",
        'an HTML page ("Just a moment...") saved under a model\'s name',
    ),
    "json": (b'{"error": "Unauthorized"}', "json", 'a JSON text ({"error": "Unauthorized"})'),
    "text": (b"404: Not Found", "text", "a text (404: Not Found)"),
    "zeros": (bytes(5000), "zeros", "a file of zeros"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "image", "a PNG image"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(100), "gguf", "a quantised GGUF model"),
    "pickle": (pickle.dumps({"a": 1}), "pickle", "a pickle"),
    "noise": (bytes(range(1, 256)), "not-a-model", "not a safetensors file"),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_files_that_are_no_model(name: str, tmp_path: Path) -> None:
    content, kind, description = OTHER_FILES[name]
    (tmp_path / "sdxl.safetensors").write_bytes(content)
    found = identify(tmp_path / "sdxl.safetensors")
    assert (found.kind, found.description[: len(description)]) == (kind, description)
    assert not found.is_readable


def test_zips_and_checkpoints(tmp_path: Path) -> None:
    _torch_zip(tmp_path / "model.ckpt")
    _zip(tmp_path / "photos.safetensors")
    assert identify(tmp_path / "model.ckpt").kind == "pickle"
    assert identify(tmp_path / "photos.safetensors").kind == "zip"
    assert identify(tmp_path / "absent.safetensors").kind == "missing"


def test_cut_short_at_every_place(tmp_path: Path) -> None:
    whole = write_holes(tmp_path / "whole.safetensors", BASE)
    size = whole.stat().st_size
    with whole.open("rb") as stream:
        beginning = stream.read(40_000)
    header_end = 8 + int.from_bytes(beginning[:8], "little")
    path = tmp_path / "cut.safetensors"
    for length in (header_end // 2, header_end, size // 2, size - 1):
        path.write_bytes(beginning[:length])
        with path.open("r+b") as stream:
            stream.truncate(length)
        assert identify(path).kind == "truncated", length
    assert f"it has {size - 1:,} bytes, and its header says {size:,}" in identify(path).description
    with path.open("r+b") as stream:
        stream.truncate(size + 3)
    assert identify(path).description.endswith("3 bytes follow the end that its header names")


def _with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def _entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4), **more: object) -> bytes:
    return json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets, **more}}).encode()


HOSTILE = {
    "deep": b'{"a":' + b"[" * 2_000_000,
    "many values": b'{"a":[' + b"[]," * 5_000_000 + b"0]}",
    "many names": b"{" + b",".join(b'"%x":{}' % i for i in range(200_000)) + b"}",
    "long number": b'{"a":' + b"9" * 5_000_000 + b"}",
    "not JSON": b"{nonsense",
    "a list": b"{} []",
    "bad utf-8": b'{"\xff\xfe": {}}',
    "double name": b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}',
    "no tensor": b'{"a": 3}',
    "metadata": b'{"__metadata__": {"a": {}}}',
    "unknown dtype": _entry(dtype="F128"),
    "dtype of a list": _entry(dtype=["F32"]),
    "negative shape": _entry(shape=[-1]),
    "fraction": _entry(shape=[1.0]),
    "truth": _entry(shape=[True]),
    "huge shape": _entry(shape=[2**62] * 16),
    "many axes": _entry(shape=[1] * 1_000_000),
    "wrong size": _entry(shape=[2]),
    "backwards": _entry(offsets=[4, 0]),
    "hole": _entry(offsets=[4, 8]),
    "three offsets": _entry(offsets=[0, 4, 8]),
    "further keys": _entry(quant=1),
    "control characters": json.dumps({"\x1b[2J\n" * 1000: {}}).encode(),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(_with_header(HOSTILE[name], bytes(4)))
    with pytest.raises(HeaderFault):
        read_header(path)
    found = identify(path)
    assert found.kind == "damaged"
    assert len(found.description) < 400
    assert found.description.isprintable()


@pytest.mark.e2e
def test_hostile_headers_take_little_memory(tmp_path: Path) -> None:
    """Of addresses 700 MB at most, for a header of 100 MB and for the worst of 32 MiB."""
    script = (
        "import resource, sys; from pathlib import Path; from trainer.model_files.examine.identify import identify\n"
        "resource.setrlimit(resource.RLIMIT_AS, (700 << 20,) * 2)\n"
        "for path in sys.argv[1:]: print(identify(Path(path)).kind)"
    )
    worst = [b'{"a":[' + b"[]," * 700_000 + b"0]}", b"{" + b",".join(b'"%x":{}' % i for i in range(700_000)) + b"}"]
    worst += [b"{" + b" " * (90 << 20) + b"}", b'{"a":"' + b"x" * (31 << 20) + b'"}']
    paths = []
    for number, header in enumerate(worst):
        paths.append(tmp_path / f"{number}.safetensors")
        paths[-1].write_bytes(_with_header(header))
    command = [sys.executable, "-c", script, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["damaged"] * 4, done.stderr[-500:]


def _write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


SDXL_UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "cross_attention_dim": 2048,
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
}
SD1_UNET = {
    "_class_name": "UNet2DConditionModel",
    "in_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
}
FOLDER_UNETS = {
    "sdxl": (SDXL_UNET, "sdxl", "an SDXL base model in diffusers' layout without its"),
    "refiner": (
        SDXL_UNET | {"cross_attention_dim": 1280, "projection_class_embeddings_input_dim": 2560},
        "sdxl-refiner",
        "the SDXL refiner",
    ),
    "inpainting": (SDXL_UNET | {"in_channels": 9}, "sdxl-inpainting", "an SDXL inpainting model"),
    "SSD-1B": (SDXL_UNET | {"transformer_layers_per_block": [0, [2, 2], [4, 4]]}, "sdxl-other", "a relative of SDXL"),
    "sd1": (SD1_UNET, "sd1", "a Stable Diffusion 1 model"),
    "nonsense": ({"_class_name": {"a": 1}}, "other-diffusion", "the folder of"),
}


@pytest.mark.parametrize("name", FOLDER_UNETS)
def test_diffusers_folders(name: str, tmp_path: Path) -> None:
    config, kind, description = FOLDER_UNETS[name]
    _write_json(tmp_path / "unet" / "config.json", config)
    found = identify(tmp_path)
    assert (found.kind, found.layout, found.description[: len(description)]) == (kind, "diffusers", description)


def test_other_folders(tmp_path: Path) -> None:
    assert identify(tmp_path).description == "an empty folder"
    _write_json(tmp_path / "lora" / "adapter_config.json", {})
    assert identify(tmp_path / "lora").kind == "lora"
    _write_json(tmp_path / "flux" / "model_index.json", {"_class_name": "FluxPipeline"})
    assert identify(tmp_path / "flux").kind == "flux"
    _write_json(tmp_path / "step-00000001" / "unet" / "config.json", SDXL_UNET)
    _write_json(tmp_path / "step-00000001" / "manifest.json", {})
    found = identify(tmp_path / "step-00000001")
    assert (found.kind, found.layout, found.parts) == ("unet", "checkpoint", ("unet",))
    assert found.description == "a checkpoint of this trainer, with the UNet of an SDXL base model"
    _write_json(tmp_path / "step-00000001" / "text_encoder_2" / "config.json", {})
    assert identify(tmp_path / "step-00000001").parts == ("unet", "text_encoder_2")
    write_holes(tmp_path / "base.safetensors", BASE)
    assert identify(tmp_path).mend == "give base.safetensors itself"


def test_a_real_folder_and_its_damage(model_folder: Path, tmp_path: Path) -> None:
    found = identify(model_folder)
    assert (found.kind, found.layout) == ("sdxl", "diffusers")
    assert found.parts == ("unet", "vae", "text_encoder", "text_encoder_2")
    assert found.description.startswith("an SDXL base model")
    assert identify(model_folder / "vae").kind == "vae"
    assert identify(model_folder / "vae" / "diffusion_pytorch_model.safetensors").kind == "vae"
    assert identify(model_folder / "text_encoder_2" / "model.safetensors").kind == "text-encoder"
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for part in model_folder.iterdir():
        (damaged / part.name).mkdir()
        for file in part.iterdir():
            content = file.read_bytes()
            cut = part.name == "vae" and file.suffix == ".safetensors"
            (damaged / part.name / file.name).write_bytes(content[:-1] if cut else content)
    found = identify(damaged)
    assert found.kind == "truncated"
    assert found.description.startswith("not whole: vae/diffusion_pytorch_model.safetensors is a safetensors file cut")

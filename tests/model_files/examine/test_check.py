import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.model_files.examine.check import check_model


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def _problems(path: Path, vae: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        check_model(path, vae)
    assert all("\n" not in line for line in caught.value.lines)
    return caught.value.lines


def _set(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_whole_model_passes_without_torch(model_folder: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from trainer.model_files.examine.check import check_model
from trainer.model_files.diffusers_folder import weights_fingerprint
check_model(Path({str(model_folder)!r}))
check_model(Path({str(model_folder)!r}), Path({str(model_folder / "vae")!r}))
weights_fingerprint(Path({str(model_folder / "vae")!r}))
heavy = sorted({{"torch", "transformers", "diffusers", "accelerate"}} & set(sys.modules))
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    file = tmp_path / "sdxl.safetensors"
    file.write_bytes(b"")
    assert _problems(file) == (
        f"model.path: {file} is an empty file; wanted SDXL base (one .safetensors file or a diffusers folder); "
        "download or copy it again",
    )
    assert "absent is not there; wanted SDXL base" in _problems(tmp_path / "absent")[0]
    assert "is an empty folder; wanted SDXL base" in _problems(_made(tmp_path / "empty"))[0]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_every_problem_has_its_line(copied: Path) -> None:
    shutil.rmtree(copied / "text_encoder")
    (copied / "vae" / "config.json").unlink()
    (copied / "text_encoder_2" / "model.safetensors").unlink()
    (copied / "tokenizer" / "vocab.json").unlink()
    shutil.rmtree(copied / "tokenizer_2")
    lines = _problems(copied)
    assert len(lines) == 4
    expected = [
        "vae/config.json: the file is missing",
        "text_encoder: the folder is missing",
        "no weights; wanted model.safetensors",
        "has no tokenizer, and the hub's cache has none: run `hf download openai/clip-vit-large-patch14",
    ]
    for line, words in zip(lines, expected, strict=True):
        assert line.startswith("model.path: ")
        assert words in line


def test_broken_weight_files(copied: Path) -> None:
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for content, words in [
        (whole[:-100], f"cut short: it has {len(whole) - 100:,} bytes, and its header says {len(whole):,}; download"),
        (whole[:1000], "is a safetensors file cut short"),
        (b"", "is an empty file"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is an HTML page saved under"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "run `git lfs pull`"),
    ]:
        weights.write_bytes(content)
        (line,) = _problems(copied)
        assert str(weights) in line
        assert words in line
    weights.unlink()
    (copied / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"")
    assert "diffusion_pytorch_model.bin is a pickle, which is not read" in _problems(copied)[0]


def test_other_models(copied: Path) -> None:
    config = copied / "unet" / "config.json"
    original = config.read_text()
    shutil.rmtree(copied / "tokenizer")
    _set(config, addition_embed_type=None, cross_attention_dim=768, projection_class_embeddings_input_dim=None)
    (line,) = _problems(copied)
    assert (
        line == f"model.path: {copied} is a Stable Diffusion 1 model; wanted SDXL base (one .safetensors file or a "
        "diffusers folder)"
    )
    config.write_text(original)
    _set(config, cross_attention_dim=1280, projection_class_embeddings_input_dim=2560)
    (line,) = _problems(copied)
    assert "is the SDXL refiner; wanted SDXL base" in line


def test_parts_that_do_not_fit_together(copied: Path) -> None:
    config = copied / "unet" / "config.json"
    _set(config, cross_attention_dim=2048, projection_class_embeddings_input_dim=2816, out_channels=8)
    lines = _problems(copied)
    assert len(lines) == 3
    assert "cross_attention_dim is 2048, and the text encoders' hidden sizes add up to 40" in lines[0]
    assert "is 2816, and text_encoder_2 projection_dim + 6 x unet addition_time_embed_dim is 72" in lines[1]
    assert "gives 8 channels, and the VAE's latents have 4" in lines[2]
    _set(config, in_channels=9)
    (line,) = _problems(copied)
    assert "is an SDXL inpainting model (9 input channels); wanted SDXL base" in line


def test_a_vae_of_ones_own_stands_in(copied: Path, tmp_path: Path) -> None:
    vae = Path(shutil.move(copied / "vae", tmp_path / "own"))
    assert "vae: the folder is missing" in _problems(copied)[0]
    check_model(copied, vae)
    (line,) = _problems(copied, tmp_path / "absent")
    assert line.startswith("model.vae: ")
    _set(vae / "config.json", latent_channels=16)
    assert "VAE's latents have 16" in _problems(copied, vae)[0]

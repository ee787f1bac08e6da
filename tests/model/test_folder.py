import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.model.folder import check_model_folder, weights_fingerprint


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def _problems(path: Path, vae: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        check_model_folder(path, vae)
    assert all("\n" not in line for line in caught.value.lines)
    return caught.value.lines


def _set(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_whole_model_passes_without_torch(model_folder: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from trainer.model.load import check_model_folder, weights_fingerprint
check_model_folder(Path({str(model_folder)!r}))
check_model_folder(Path({str(model_folder)!r}), Path({str(model_folder / "vae")!r}))
weights_fingerprint(Path({str(model_folder / "vae")!r}))
heavy = sorted({{"torch", "transformers", "diffusers", "accelerate"}} & set(sys.modules))
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_paths_that_are_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "sdxl.safetensors"
    file.write_bytes(b"")
    assert "single files are not read yet" in _problems(file)[0]
    assert "single files are not read yet" in _problems(tmp_path / "absent.safetensors")[0]
    assert "no such folder; wanted SDXL in diffusers' folder layout" in _problems(tmp_path / "absent")[0]
    hub = _problems(Path("stabilityai/stable-diffusion-xl-base-1.0"))
    assert "hub ids are not read yet" in hub[0]
    assert "hf download stabilityai/stable-diffusion-xl-base-1.0 --local-dir" in hub[0]


def test_every_problem_has_its_line(copied: Path) -> None:
    shutil.rmtree(copied / "text_encoder")
    (copied / "vae" / "config.json").unlink()
    (copied / "text_encoder_2" / "model.safetensors").unlink()
    (copied / "tokenizer" / "vocab.json").unlink()
    shutil.rmtree(copied / "tokenizer_2")
    lines = _problems(copied)
    assert len(lines) == 5
    expected = [
        "vae/config.json: the file is missing",
        "text_encoder: the folder is missing",
        "no weights; wanted model.safetensors",
        "tokenizer: vocab.json missing",
        "tokenizer_2: the folder is missing",
    ]
    for line, words in zip(lines, expected, strict=True):
        assert line.startswith("model.path: ")
        assert words in line


def test_broken_weight_files(copied: Path) -> None:
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for content, words in [
        (whole[:-100], f"has {len(whole) - 100} bytes, and its header says {len(whole)}"),
        (whole[:1000], "is not a safetensors file, or it is cut short"),
        (b"", "is not a safetensors file, or it is cut short"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "is not a safetensors file"),
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
    _set(config, addition_embed_type=None, cross_attention_dim=768)
    (line,) = _problems(copied)
    assert "the UNet is Stable Diffusion 1 (addition_embed_type None, cross_attention_dim 768); wanted SDXL" in line
    config.write_text(original)
    _set(config, cross_attention_dim=1280, projection_class_embeddings_input_dim=2560)
    (line,) = _problems(copied)
    assert "the UNet is the SDXL refiner" in line


def test_parts_that_do_not_fit_together(copied: Path) -> None:
    config = copied / "unet" / "config.json"
    _set(config, cross_attention_dim=2048, projection_class_embeddings_input_dim=2816, in_channels=9)
    lines = _problems(copied)
    assert len(lines) == 3
    assert "cross_attention_dim is 2048, and the text encoders' hidden sizes add up to 40" in lines[0]
    assert "is 2816, and text_encoder_2 projection_dim + 6 x unet addition_time_embed_dim is 72" in lines[1]
    assert "takes 9 channels, and the VAE's latents have 4" in lines[2]


def test_v_prediction_models_are_refused(copied: Path) -> None:
    _set(copied / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert "prediction_type is v_prediction; only epsilon models are trained yet" in _problems(copied)[0]
    shutil.rmtree(copied / "scheduler")
    check_model_folder(copied)


def test_a_vae_of_ones_own_stands_in(copied: Path, tmp_path: Path) -> None:
    vae = Path(shutil.move(copied / "vae", tmp_path / "own"))
    assert "vae: the folder is missing" in _problems(copied)[0]
    check_model_folder(copied, vae)
    (line,) = _problems(copied, tmp_path / "absent")
    assert line.startswith("model.vae: ")
    _set(vae / "config.json", latent_channels=16)
    assert "VAE's latents have 16" in _problems(copied, vae)[0]


def test_fingerprint_heeds_weights_and_meaning_only(copied: Path, tmp_path: Path) -> None:
    vae = copied / "vae"
    original = weights_fingerprint(vae)
    assert len(original) == 32
    assert weights_fingerprint(Path(shutil.copytree(vae, tmp_path / "elsewhere"))) == original
    _set(vae / "config.json", _diffusers_version="9.9", _name_or_path="/x", torch_dtype="float16")
    assert weights_fingerprint(vae) == original
    _set(vae / "config.json", scaling_factor=0.14)
    changed = weights_fingerprint(vae)
    assert changed != original
    weights = vae / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert weights_fingerprint(vae) not in (original, changed)

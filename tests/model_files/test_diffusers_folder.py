import json
import shutil
from pathlib import Path
from typing import Any

from trainer.model_files.diffusers_folder import weights_fingerprint


def _set(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_fingerprint_heeds_weights_and_meaning_only(model_folder: Path, tmp_path: Path) -> None:
    vae = Path(shutil.copytree(model_folder / "vae", tmp_path / "vae"))
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

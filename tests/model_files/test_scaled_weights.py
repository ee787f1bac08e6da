"""Weights in 8 bits whose scales lie beside them are never read as if there were none: one rule for every part."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.model_files.single_files import rewrite, write_single_file
from trainer.errors import UserError
from trainer.model_files.diffusers_folder import weight_files
from trainer.model_files.examine.check import check_model
from trainer.model_files.key_map import COMPONENTS, PREFIXES
from trainer.model_files.model_source import find_source, open_component

RULE = "its weights are scaled fp8, which is not read; wanted fp32, bf16, fp16 or fp8 that is not scaled"


@pytest.fixture(scope="module")
def single_file(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(model_folder, tmp_path_factory.mktemp("plain") / "small.safetensors")


def scaled(tensors: dict[str, torch.Tensor], prefix: str, scale: str) -> dict[str, torch.Tensor]:
    """One matrix of a part as ComfyUI's scaled files have it."""
    name = next(
        name for name in tensors if name.startswith(prefix) and tensors[name].ndim > 1 and "embedding" not in name
    )
    factor = tensors[name].float().abs().max() / 448
    changed = {name: (tensors[name].float() / factor).to(torch.float8_e4m3fn)}
    return tensors | changed | {f"{name.removesuffix('.weight')}.{scale}": factor.reshape(1)}


@pytest.mark.parametrize("scale", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_a_single_file(component: str, scale: str, single_file: Path, model_folder: Path, tmp_path: Path) -> None:
    path = rewrite(single_file, tmp_path / "s.safetensors", lambda plain: scaled(plain, PREFIXES[component], scale))
    with pytest.raises(UserError) as refused:
        check_model(path, tokenizer=model_folder / "tokenizer")
    assert len(refused.value.lines) == 1
    assert scale in str(refused.value) and RULE in str(refused.value)
    with pytest.raises(UserError, match=RULE):  # as workers, exports and merges open it
        open_component(find_source(path), component)


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_folder(component: str, model_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(model_folder, tmp_path / "model")
    (file,) = weight_files(model / component)
    save_file(scaled(load_file(file), "", "scale_weight"), file)
    with pytest.raises(UserError) as refused:
        check_model(model)
    assert len(refused.value.lines) == 1 and RULE in str(refused.value)
    with pytest.raises(UserError, match=RULE):
        open_component(find_source(model), component)

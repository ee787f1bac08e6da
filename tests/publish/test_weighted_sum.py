"""Weighted sums of models, against the sums computed directly."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.errors import UserError
from trainer.model_files.components import Component
from trainer.model_files.key_map import COMPONENTS, block_of
from trainer.model_files.model_source import find_source, open_component
from trainer.publish.weighted_sum import merged_parts
from trainer.publish.write_model import Precision, plan_single_file, write_single_file

FULL = Precision(torch.float32, torch.float32)


def parts_of(model: Path) -> dict[str, Component]:
    return {name: open_component(find_source(model), name) for name in COMPONENTS}


def write(path: Path, parts: dict[str, Component]) -> dict[str, torch.Tensor]:
    write_single_file(path, plan_single_file(parts, FULL), {})
    return load_file(path)


@pytest.fixture(scope="module")
def models(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder, and a single file in bf16 with other weights."""
    other = tmp_path_factory.mktemp("merge") / "other.safetensors"
    planned = plan_single_file(parts_of(model_folder), Precision(torch.bfloat16, torch.bfloat16))
    write_single_file(other, planned, {"sdxl_train.configs": _configs(model_folder)})
    tensors = load_file(other)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.endswith("logit_scale"):
            tensors[name] = tensor + torch.randn(tensor.shape).bfloat16()
    save_file(tensors, other, metadata={"sdxl_train.configs": _configs(model_folder)})
    return model_folder, other


def _configs(model: Path) -> str:
    from trainer.publish.write_model import file_metadata

    return file_metadata(parts_of(model))["sdxl_train.configs"]


def test_it_is_the_weighted_sum_in_fp32(models: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = (parts_of(model) for model in models)
    blocks = [("input_blocks", 0.0), ("input_blocks.1", 0.5), ("text_encoder_1", 1.0), ("*.bias", 0.25)]
    found = write(tmp_path / "merged.safetensors", merged_parts(a, b, 0.3, blocks))
    of_a, of_b = write(tmp_path / "a.safetensors", a), write(tmp_path / "b.safetensors", b)
    seen = set()
    for name, tensor in found.items():
        block, share = block_of(name), 0.3
        if block.startswith("vae"):
            share = 0.0
        if block.startswith("input_blocks"):
            share = 0.5 if block.startswith("input_blocks.1.") else 0.0
        if block.startswith("text_encoder_1"):
            share = 1.0
        if name.endswith(".bias"):
            share = 0.25
        if "position_ids" in name or "logit_scale" in name:
            assert torch.equal(tensor, of_a[name])
            continue
        seen.add((block.split(".")[0], share))
        wanted = of_a[name].double() * (1 - share) + of_b[name].double() * share
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-6)
        if share in (0.0, 1.0):
            assert torch.equal(tensor, (of_b if share else of_a)[name])
    assert {("input_blocks", 0.5), ("input_blocks", 0.0), ("output_blocks", 0.3), ("vae", 0.0)} <= seen


def test_a_model_merged_with_itself_is_itself(models: tuple[Path, Path], tmp_path: Path) -> None:
    b = parts_of(models[1])
    merged = write(tmp_path / "merged.safetensors", merged_parts(b, b, 0.7, [("vae", 0.1)]))
    plain = write(tmp_path / "plain.safetensors", b)
    assert merged.keys() == plain.keys() and all(torch.equal(merged[name], plain[name]) for name in plain)


def test_what_does_not_go_together_is_refused(models: tuple[Path, Path]) -> None:
    a, b = (parts_of(model) for model in models)
    with pytest.raises(UserError, match=r"--block input_block\.4=0\.5: means no tensor"):
        merged_parts(a, b, 0.3, [("input_block.4", 0.5)])
    narrow = dict(b["unet"].tensors)
    narrow["conv_in.weight"] = narrow["conv_in.bias"]
    with pytest.raises(UserError, match=r"conv_in\.weight has shape \[16\].* only models of the same shape"):
        merged_parts(a, b | {"unet": Component("unet", models[1], b["unet"].config, narrow)}, 0.3)

"""The command `adapter`: merged is unmerged, what is extracted is what was put in, and files that are wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.cli.main import main

Tensors = dict[str, Tensor]
BLOCK = "lora_unet_input_blocks_3_1_transformer_blocks_0_attn1_to_q"
MODULE = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture(scope="module")
def base(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as others find it."""
    folder = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    return folder


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("sdxl-train: ")


def unet_of(folder: Path) -> Tensors:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def lora(rank: int = 2, width: int = 32, **more: Tensor) -> Tensors:
    torch.manual_seed(1)
    return {
        f"{BLOCK}.lora_down.weight": torch.randn(rank, width),
        f"{BLOCK}.lora_up.weight": torch.randn(width, rank),
        f"{BLOCK}.alpha": torch.tensor(1.0),
        **more,
    }


def tuned(base: Path, folder: Path, rank: int) -> Path:
    """The model with changes of this rank in its transformers and convolutions."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(2)
    for name, file in (("unet", "diffusion_pytorch_model.safetensors"), ("text_encoder", "model.safetensors")):
        tensors = load_file(folder / name / file)
        for key, tensor in tensors.items():
            if (".attn" in key or "conv1" in key or "self_attn" in key) and key.endswith(".weight"):
                sides = tensor.flatten(1).shape
                left = torch.randn(sides[0], rank, generator=generator)
                change = left @ torch.randn(rank, sides[1], generator=generator) * 0.05
                tensors[key] = tensor + change.view_as(tensor)
        save_file(tensors, folder / name / file, {"format": "pt"})
    return folder


def test_what_is_extracted_and_merged_is_what_was_changed(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = tuned(base, tmp_path / "tuned", 3)
    file, whole = tmp_path / "made.safetensors", tmp_path / "whole"
    run("adapter", "extract", base, changed, "--rank", 4, "--conv-rank", 3, "--dtype", "fp32", "-o", file)
    assert "the LoRA holds 100.00% of the change" in capsys.readouterr().out
    run("adapter", "merge", base, file, "--layout", "diffusers", "--dtype", "fp32", "-o", whole)
    expected, found, plain = unet_of(changed), unet_of(whole), unet_of(base)
    assert any((plain[name] - expected[name]).abs().max() > 0.1 for name in expected)
    assert max((found[name] - expected[name]).abs().max().item() for name in expected) < 1e-4
    texts = [load_file(folder / "text_encoder" / "model.safetensors") for folder in (whole, changed)]
    assert (
        max((texts[0][f"text_model.{n.removeprefix('text_model.')}"] - t).abs().max() for n, t in texts[1].items())
        < 1e-4
    )
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    assert isinstance(unet, UNet2DConditionModel)


def test_a_lower_rank_says_how_much_it_holds(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the singular values of each difference."""
    changed, file = tuned(base, tmp_path / "tuned", 6), tmp_path / "made.safetensors"
    arguments = ("--rank", 2, "--no-text-encoders", "--dtype", "fp32", "-o", file)
    run("adapter", "extract", base, changed, *arguments)
    held = whole = 0.0
    for name, tensor in unet_of(changed).items():
        if ".attn" in name and name.endswith(".weight"):
            squares = torch.linalg.svdvals((tensor - unet_of(base)[name]).double()).square()
            held, whole = held + squares[:2].sum().item(), whole + squares.sum().item()
    assert f"holds {held / whole:.2%} of the change" in capsys.readouterr().out
    assert not any(name.startswith("lora_te") for name in load_file(file))


def test_large_matrices_are_decomposed_as_well_as_by_all_singular_values() -> None:
    from trainer.publish.adapter_extract import truncated

    torch.manual_seed(0)
    matrix = torch.randn(700, 20) @ torch.randn(20, 600) + 0.01 * torch.randn(700, 600)
    down, up = truncated(matrix, 20, "layer")
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    best = (left[:, :20] * values[:20]) @ right[:20]
    assert (up @ down - best).norm() < 1e-4 * best.norm()
    again = truncated(matrix, 20, "layer")
    assert torch.equal(down, again[0]) and torch.equal(up, again[1])


@pytest.mark.parametrize("strength", [0.0, 0.8, -1.0])
def test_strength(base: Path, tmp_path: Path, strength: float) -> None:
    save_file(lora(), tmp_path / "fox.safetensors")
    arguments = ("--strength", strength, "--layout", "diffusers", "--dtype", "fp32", "-o", tmp_path / "out")
    run("adapter", "merge", base, tmp_path / "fox.safetensors", *arguments)
    before, after, own = unet_of(base), unet_of(tmp_path / "out"), lora()
    change = own[f"{BLOCK}.lora_up.weight"] @ own[f"{BLOCK}.lora_down.weight"] / 2
    assert (after[MODULE] - before[MODULE] - strength * change).abs().max() < 1e-6
    assert all(torch.equal(before[name], after[name]) for name in before if name != MODULE)


def test_inspect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"modelspec.title": "Fox \x1b[31m", "ss_network_module": "networks.lora"}
    save_file(lora(), tmp_path / "fox.safetensors", told)
    run("adapter", "inspect", tmp_path / "fox.safetensors")
    said = capsys.readouterr().out
    assert "LoRA named as in kohya's files, 128 weights in F32" in said
    assert "rank: 2" in said and "alpha: 1" in said and "text encoders: unchanged" in said
    assert r"modelspec.title: Fox \x1b[31m" in said and "\x1b" not in said
    run("adapter", "inspect", tmp_path / "fox.safetensors", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["ranks"] == {"2": 1} and facts["layers"] == {"UNet": 1}


def _renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {name.replace(old, new): tensor for name, tensor in tensors.items()}


WRONG: dict[str, tuple[Tensors | Callable[[], Tensors], str]] = {
    "other ranks": (
        lora(**{f"{BLOCK}.lora_up.weight": torch.zeros(32, 3)}),
        f"the tensors of {BLOCK} do not go together: lora_down.weight [2, 32], lora_up.weight [32, 3]",
    ),
    "a half": (
        {f"{BLOCK}.lora_down.weight": torch.zeros(2, 32)},
        f"{BLOCK} holds lora_down.weight, which is no kind of adapter that is known",
    ),
    "a vector": (
        lora(**{f"{BLOCK}.lora_down.weight": torch.zeros(2)}),
        f"the tensors of {BLOCK} do not go together: lora_down.weight [2], lora_up.weight [32, 2]",
    ),
    "empty": (
        lora(**{f"{BLOCK}.lora_down.weight": torch.zeros(0, 32), f"{BLOCK}.lora_up.weight": torch.zeros(32, 0)}),
        f"the tensors of {BLOCK} do not go together: lora_down.weight [0, 32], lora_up.weight [32, 0]",
    ),
    "integers": (
        lora(**{f"{BLOCK}.lora_down.weight": torch.zeros(2, 32, dtype=torch.int32)}),
        f"the tensors of {BLOCK} do not go together: lora_down.weight [2, 32], lora_up.weight [32, 2]",
    ),
    "many alphas": (lora(**{f"{BLOCK}.alpha": torch.ones(3)}), f"{BLOCK}.alpha has shape [3]; wanted one number"),
    "tucker": (
        lora(**{f"{BLOCK}.lora_mid.weight": torch.zeros(2, 2, 3, 3)}),
        f"{BLOCK} is a LoCon with CP decomposition, which is not read here",
    ),
    "unknown": (
        {"model.weight": torch.zeros(2)},
        "holds model.weight, which is no tensor of an adapter that is known here",
    ),
    "escapes": (
        {"\x1b[31mevil.weight": torch.zeros(2)},
        r"holds \x1b[31mevil.weight, which is no tensor of an adapter that is known here",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors, line = WRONG[case]
    assert isinstance(tensors, dict)
    file = tmp_path / "fox.safetensors"
    save_file(tensors, file)
    assert refused(capsys, "adapter", "inspect", file) == f"{file}: {line}"


def test_a_damaged_file_is_one_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "fox.safetensors"
    save_file(lora(), file)
    whole = file.read_bytes()
    for data, said in (
        (whole[:-10], "is a safetensors file cut short"),
        (b"", "is an empty file"),
        (b"\x80\x02}q\x00.", "is a pickle"),
        (b"PK\x03\x04" + b"data.pkl" * 9, "is a pickled PyTorch checkpoint"),
        (whole[:8] + b"{" * 40 + whole[48:], "is a damaged safetensors file"),
    ):
        file.write_bytes(data)
        for command in (("inspect", file), ("merge", base, file, "-o", tmp_path / "out.safetensors")):
            assert refused(capsys, "adapter", *command).startswith(f"{file}: {said}")
    assert (
        refused(capsys, "adapter", "inspect", tmp_path) == f"{tmp_path}: a folder; give the adapter's .safetensors file"
    )
    assert refused(capsys, "adapter", "inspect", tmp_path / "no") == f"{tmp_path / 'no'}: no such file"


def test_an_adapter_of_another_model_is_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "fox.safetensors", tmp_path / "out.safetensors"

    def merged(tensors: Tensors) -> str:
        save_file(tensors, file)
        line = refused(capsys, "adapter", "merge", base, file, "-o", out)
        assert not out.exists() and not (tmp_path / "out.safetensors.tmp").exists()
        return line.removeprefix(f"{file}: ")

    other = "lora_unet_double_blocks_0_img_attn"
    assert merged(_renamed(lora(), BLOCK, other)).startswith(
        f"1 of its 1 layers are none of the model's, such as {other}; it was made for another kind of model"
    )
    assert merged(lora(width=48)).startswith(f"{BLOCK} does not fit the model's weight of shape [32, 32]")
    twice = _renamed(lora(), "input_blocks_3_1", "down_blocks_1_attentions_0")
    assert "are one layer" in merged(lora() | twice)
    nan: dict[str, Any] = {f"{BLOCK}.alpha": torch.tensor(float("nan"))}
    assert merged(lora(**nan)).endswith("NaN or infinite values; the model is broken")


def test_equal_models_make_no_lora(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made.safetensors"
    line = refused(capsys, "adapter", "extract", base, base, "-o", out)
    assert line == f"{out}: not written; the layers of both models are equal"
    assert refused(capsys, "adapter", "extract", base, base, "--rank", 0, "-o", out).startswith("--rank: 0 must be")

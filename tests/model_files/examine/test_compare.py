"""Two models compared: against sums made directly, across layouts and dtypes, with what one of them lacks."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from trainer.cli.main import main
from trainer.evaluate.change_chart import change_chart_png, percent, short_names
from trainer.model_files.examine.compare import Change, compare
from trainer.model_files.key_map import COMPONENTS, TEXT_PROJECTION, block_of, single_file_keys
from trainer.model_files.single_file import logit_scale, position_ids, to_file

CLIP_L, CLIP_G = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def single(model_folder: Path) -> Tensors:
    """The tiny model's tensors as a single file has them."""
    configs = {name: json.loads((model_folder / name / "config.json").read_text()) for name in COMPONENTS}
    modules = {name: load_file(next((model_folder / name).glob("*.safetensors"))) for name in COMPONENTS}
    entries = single_file_keys(configs)
    tensors = {e.file_name: to_file(e, [modules[e.component][name] for name in e.names]) for e in entries}
    tensors[CLIP_L + "embeddings.position_ids"] = position_ids()
    tensors[CLIP_G + "logit_scale"] = logit_scale(torch.float32)
    return tensors


def saved(path: Path, tensors: Tensors) -> Path:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def tuned(tensors: Tensors, is_changed: Callable[[str], bool]) -> Tensors:
    """Weights with noise where they are to change."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        if is_changed(name) and tensor.is_floating_point()
        else tensor
        for name, tensor in tensors.items()
    }


def directly(a: Tensors, b: Tensors, block: str) -> tuple[float, int, int]:
    """Relative change, changed weights and weights of a block."""
    names = [name for name in a if block_of(name) == block and a[name].is_floating_point()]
    flat_a, flat_b = (torch.cat([tensors[name].double().flatten() for name in names]) for tensors in (a, b))
    return float((flat_b - flat_a).norm() / flat_a.norm()), int((flat_a != flat_b).sum()), flat_a.numel()


def test_blocks_against_direct_sums(single: Tensors, tmp_path: Path) -> None:
    other = tuned(single, lambda name: "attn" in name or "decoder.up" in name)
    found = compare(saved(tmp_path / "a.safetensors", single), saved(tmp_path / "b.safetensors", other))
    assert {change.name for change in found.blocks} >= {"input_blocks.3.1", "middle_block.1", "vae.decoder.up.0"}
    for change in found.blocks:
        relative, changed, weights = directly(single, other, change.name)
        assert change.relative == pytest.approx(relative, rel=1e-6)
        if change.name != "text_encoder_2.logit_scale":
            assert (change.changed, change.weights) == (changed, weights)
    assert sum(change.weights for change in found.components) == found.total.weights
    a, b = (torch.cat([t[n].double().flatten() for n in single if n in other and "logit" not in n and "ids" not in n])
            for t in (single, other))  # fmt: skip
    assert found.total.relative == pytest.approx(float((b - a).norm() / a.norm()), rel=1e-6)
    assert not found.only_a
    assert not found.only_b


def test_layouts_meet(single: Tensors, model_folder: Path, tmp_path: Path) -> None:
    """A folder and a single file of the same weights are equal, either way round; a change is found across them."""
    path = saved(tmp_path / "single.safetensors", single)
    for pair in ((model_folder, path), (path, model_folder)):
        found = compare(*pair)
        assert (found.total.changed, found.only_a, found.only_b, found.other_shape) == (0, (), (), ())
        assert found.total.weights == sum(t.numel() for n, t in single.items() if "logit" not in n and "ids" not in n)
        assert found.text_projection.verdict == "correct"
    other = tuned(single, lambda name: "text_projection" in name or "in_proj" in name)
    found = compare(model_folder, saved(tmp_path / "other.safetensors", other))
    changed = {change.name: change.relative for change in found.blocks if change.changed}
    assert set(changed) == {"text_encoder_2.text_projection", *(f"text_encoder_2.layers.{n}" for n in range(4))}
    for block, relative in changed.items():
        assert relative == pytest.approx(directly(single, other, block)[0], rel=1e-5)


def test_a_checkpoint_holds_the_unet_alone(single: Tensors, model_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(model_folder / "unet", tmp_path / "step-00000001" / "unet")
    shutil.copytree(model_folder / "unet", tmp_path / "step-00000001" / "unet_ema")
    (tmp_path / "step-00000001" / "manifest.json").write_text("{}")
    found = compare(saved(tmp_path / "a.safetensors", single), tmp_path / "step-00000001")
    assert [change.name for change in found.components] == ["unet"]
    assert found.total.changed == 0
    assert {name.split(".")[0] for name in found.only_a} == {"first_stage_model", "conditioner"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_change(dtype: torch.dtype, single: Tensors, tmp_path: Path) -> None:
    rounded = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in single.items()}
    a, b = saved(tmp_path / "a.safetensors", single), saved(tmp_path / "b.safetensors", rounded)
    for pair in ((a, b), (b, a)):
        found = compare(*pair)
        assert (found.total.changed, found.total.squared_difference) == (0, 0.0)
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in single.items()}
    brain = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in half.items()}
    found = compare(saved(tmp_path / "a.safetensors", half), saved(tmp_path / "b.safetensors", brain))
    assert found.total.changed == 0
    assert found.dtypes == (("F16",), ("BF16",))


def test_what_one_lacks_and_what_is_not_finite(single: Tensors, tmp_path: Path) -> None:
    other = dict(single)
    name = "model.diffusion_model.label_emb.0.0.weight"
    other[name] = single[name].clone()
    other[name][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    del other[CLIP_G + "ln_final.weight"]
    other["v_pred"] = torch.tensor([])
    other[CLIP_G + "ln_final.bias"] = torch.ones(7)
    found = compare(saved(tmp_path / "a.safetensors", single), saved(tmp_path / "b.safetensors", other))
    assert found.only_a == (CLIP_G + "ln_final.weight",)
    assert found.only_b == ()
    assert found.other_shape == (CLIP_G + "ln_final.bias",)
    assert (found.total.not_finite, found.total.changed) == (3, 0)


@pytest.mark.e2e
def test_a_transposed_projection_is_told(single: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = single | {TEXT_PROJECTION: single[TEXT_PROJECTION].T}
    paths = [saved(tmp_path / f"{n}.safetensors", tensors) for n, tensors in enumerate((single, other))]
    assert compare(*paths).text_projection.verdict == "transposed"
    assert main(["inspect", *map(str, paths)]) == 0
    assert "warning: B's text projection is transposed against A's" in capsys.readouterr().out


@pytest.mark.e2e
def test_the_command_and_its_chart(single: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tuned(single, lambda name: "attn" in name)
    a, b = saved(tmp_path / "base.safetensors", single), saved(tmp_path / "tuned.safetensors", other)
    assert main(["inspect", str(a), str(b)]) == 0
    shown = capsys.readouterr().out
    assert f"chart: {b}.change.png" in shown
    assert "input_blocks.3.1" in shown
    assert max(map(len, shown.splitlines())) < 160
    with Image.open(f"{b}.change.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[1] == 1800
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    assert main(["inspect", str(a), str(b), "--json", "-o", str(tmp_path / "c.png")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["chart"] == str(tmp_path / "c.png")
    assert told["total"]["changed"] > 0


@pytest.mark.e2e
def test_equal_models_and_models_of_other_kinds_are_drawn(tmp_path: Path) -> None:
    lora = {f"lora_unet_a_{n}.lora_up.weight": torch.full((4, 4), 1.0) for n in range(3)}
    a = saved(tmp_path / "a.safetensors", lora)
    b = saved(tmp_path / "b.safetensors", {name: tensor * 0 for name, tensor in lora.items()})
    for first, second in ((a, a), (a, b), (b, a)):
        change_chart_png(compare(first, second), tmp_path / "c.png")
        with Image.open(tmp_path / "c.png") as image:
            assert image.width == 1800
    assert compare(b, a).total.relative == math.inf


def test_models_without_a_common_tensor(single: Tensors, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = saved(tmp_path / "lora.safetensors", {"lora_unet_a.lora_up.weight": torch.ones(4, 4)})
    assert main(["inspect", str(saved(tmp_path / "a.safetensors", single)), str(lora)]) == 2
    error = capsys.readouterr().err
    assert "have no tensor of the same name and size" in error
    assert error.count("\n") == 1


def test_percent_and_names() -> None:
    shares = (0.0, 1.0, 0.99996, 0.9997, 0.951, 0.1234, 0.010844, 0.0001, 3e-8, 2.5, math.inf)
    assert [percent(share) for share in shares] == [
        *("0 %", "100 %", "> 99.99 %", "99.97 %"),
        *("95.1 %", "12.3 %", "1.08 %", "0.0100 %", "3e-06 %", "250 %", "from zero"),
    ]
    assert short_names(Path("/x/base/unet"), Path("/x/tuned/unet")) == ("base/unet", "tuned/unet")
    assert Change("a", "unet", 10, 5, 4.0, 1.0, 0).relative == 0.5

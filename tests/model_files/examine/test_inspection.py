"""Inspection of real files: counts against torch's own, faults that were put in, hashes, markers, orientation."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.cli.main import main
from trainer.model_files.examine.float_bits import FORMATS, faults, rounded, values
from trainer.model_files.examine.inspection import Inspection, hash_agrees, inspect
from trainer.model_files.examine.markers import readable_metadata

UNET, CLIP_L, CLIP_G = (
    "model.diffusion_model.",
    "conditioner.embedders.0.transformer.",
    "conditioner.embedders.1.model.",
)
TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


def small_sdxl(dtype: torch.dtype = torch.float16, seed: int = 0) -> dict[str, torch.Tensor]:
    """A few tensors of every component, enough to be told for SDXL."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        UNET + "input_blocks.0.0.weight": (16, 4, 3, 3),
        UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (32, 40),
        UNET + "label_emb.0.0.weight": (64, 72),
        UNET + "output_blocks.0.0.in_layers.2.weight": (32, 64, 3, 3),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
        CLIP_L + "text_model.encoder.layers.0.mlp.fc1.weight": (32, 16),
        CLIP_G + "transformer.resblocks.0.attn.in_proj_weight": (72, 24),
        CLIP_G + "ln_final.weight": (24,),
        CLIP_G + "text_projection": (24, 24),
    }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def saved(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def looked(tmp_path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Inspection:
    return inspect(saved(tmp_path / "model.safetensors", tensors, **metadata))


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_bit_pattern_is_read_as_torch_reads_it(dtype: str) -> None:
    """All patterns of 8 and 16 bits; of wider formats, random ones."""
    bits = FORMATS[dtype].bits
    width = np.dtype(bits).itemsize
    patterns = np.arange(1 << min(8 * width, 16)).astype(bits)
    if width > 2:
        patterns = np.random.default_rng(0).integers(0, 2 ** (8 * width), 100_000, bits, endpoint=False)
        edges = [0.0, -0.0, 65504.0, 65505.0, -65520.0, np.inf, -np.inf, np.nan]
        patterns = np.concatenate([patterns, np.array(edges, f"f{width}").view(bits)])
    data = patterns.tobytes()
    theirs = torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).double()
    with np.errstate(invalid="ignore"):  # signalling NaN
        ours = values(data, dtype).astype(np.float64)
    np.testing.assert_array_equal(ours, theirs.numpy())
    found = faults(data, dtype)
    assert found.nan == int(theirs.isnan().sum())
    assert found.infinite == int(theirs.isinf().sum())
    finite = theirs[theirs.isfinite()].abs()
    assert found.beyond_fp16 == int((finite > 65504).sum())
    assert found.largest == float(finite.max())


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_rounding_is_torch_s(dtype: str) -> None:
    numbers = torch.cat([torch.randn(100_000) * 10.0 ** torch.randint(-9, 6, (100_000,)), torch.tensor([1e9, 3.4e38])])
    theirs = numbers.to(TORCH[dtype]).float().numpy()
    np.testing.assert_array_equal(rounded(numbers.numpy(), dtype), theirs)


def test_counts_and_hashes(tmp_path: Path) -> None:
    tensors = small_sdxl()
    tensors[CLIP_L + "text_model.embeddings.position_ids"] = torch.arange(77)[None]
    found = looked(tmp_path, tensors)
    data = found.path.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    assert found.files[0].sha256 == hashlib.sha256(data).hexdigest()
    assert found.files[0].data_sha256 == hashlib.sha256(data[header_end:]).hexdigest()
    parameters = {group.name: group.parameters for group in found.components}
    assert parameters["unet"] == sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(UNET))
    assert parameters["text_encoder"] == 32 * 16
    assert [group.name for group in found.blocks if group.component == "unet"] == [
        "label_emb",
        "input_blocks.0.0",
        "input_blocks.4.1",
        "output_blocks.0.0",
    ]
    assert sum(group.num_bytes for group in found.blocks) == len(data) - header_end
    assert found.numbers is not None
    assert not found.numbers.faulty
    assert found.numbers.total.largest == max(float(t.abs().max()) for t in tensors.values() if t.is_floating_point())


def test_faults_are_found_and_named(tmp_path: Path) -> None:
    tensors = small_sdxl(torch.float32)
    tensors[UNET + "label_emb.0.0.weight"][0, :3] = float("nan")
    tensors[UNET + "label_emb.0.0.weight"][1, 0] = -float("inf")
    tensors[CLIP_G + "ln_final.weight"][:2] = torch.tensor([65504.0, -65505.0])
    tensors["first_stage_model.decoder.conv_in.weight"].zero_()
    found = looked(tmp_path, tensors)
    assert found.numbers is not None
    counts = {name: (f.nan, f.infinite, f.beyond_fp16) for name, f in found.numbers.faulty.items()}
    assert counts == {UNET + "label_emb.0.0.weight": (3, 1, 0), CLIP_G + "ln_final.weight": (0, 0, 1)}
    assert (found.numbers.total.largest, found.numbers.largest_in) == (65505.0, CLIP_G + "ln_final.weight")
    assert found.numbers.all_zero == ("first_stage_model.decoder.conv_in.weight",)


PREDICTIONS = {
    "plain": ((), {}, ("epsilon", False, False)),
    "v": (("v_pred",), {"modelspec.prediction_type": "v"}, ("v_prediction", False, False)),
    "v with zero terminal SNR": (("v_pred", "ztsnr"), {}, ("v_prediction", True, False)),
    "v without its marker": ((), {"modelspec.prediction_type": "v"}, ("v_prediction", False, True)),
    "marker against metadata": (("v_pred",), {"modelspec.prediction_type": "epsilon"}, ("v_prediction", False, True)),
    "edm": (("edm_mean", "edm_std"), {}, ("edm", False, False)),
}


@pytest.mark.parametrize("name", PREDICTIONS)
def test_prediction_type(name: str, tmp_path: Path) -> None:
    markers, metadata, (kind, zero, is_warned) = PREDICTIONS[name]
    tensors = small_sdxl() | {marker: torch.tensor([]) for marker in markers}
    found = looked(tmp_path, tensors, **metadata)
    told = found.prediction
    assert (told.type, told.zero_terminal_snr, bool(told.warning)) == (kind, zero, is_warned)
    assert found.markers == markers


def test_metadata_are_summarised() -> None:
    shown = readable_metadata(
        {
            "modelspec.title": "Foxes\x1b[2J",
            "modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 4000,
            "ss_base_model_version": "sdxl_base_v1-0",
            "ss_network_dim": "32",
            "ss_lr_scheduler": "None",
            "ss_tag_frequency": json.dumps({"10_fox": {"fox": 30, "snow": 2}, "1_dog": {"dog": 5}}),
            "other": "x" * 1000,
        }
    )
    assert shown["modelspec.title"] == r"Foxes\x1b[2J"
    assert shown["modelspec.thumbnail"] == "image/jpeg, 3,000 bytes"
    assert shown["ss_network_dim"] == "32"
    assert shown["ss_tag_frequency"] == "3 tags of 2 folders, most often fox, dog, snow"
    assert shown["other"].endswith("(1,000 characters)")
    assert len(shown["other"]) < 200


def test_hash_of_the_metadata(tmp_path: Path) -> None:
    tensors = small_sdxl()
    right = looked(tmp_path, tensors).files[0].data_sha256
    assert hash_agrees(looked(tmp_path, tensors, **{"modelspec.hash_sha256": f"0x{right}"})) is True
    assert hash_agrees(looked(tmp_path, tensors, **{"modelspec.hash_sha256": "0x12"})) is False
    assert hash_agrees(looked(tmp_path, tensors)) is None


def test_orientation_by_a_reference(tmp_path: Path) -> None:
    tensors = small_sdxl(torch.float32)
    reference = saved(tmp_path / "reference.safetensors", tensors)
    name = CLIP_G + "text_projection"
    tuned = tensors[name] + 0.05 * torch.randn(24, 24)
    verdicts = []
    for matrix in (tuned, tuned.T, torch.randn(24, 24)):
        path = saved(tmp_path / "model.safetensors", tensors | {name: matrix})
        verdicts.append(inspect(path, quick=True, reference=reference).text_projection.verdict)
    assert verdicts == ["correct", "transposed", "unknown"]
    assert inspect(reference, quick=True).text_projection.verdict == "unknown"


def test_orientation_by_shape_and_by_name(tmp_path: Path) -> None:
    tensors = small_sdxl()
    name = CLIP_G + "text_projection"
    assert looked(tmp_path, tensors | {name: torch.ones(24, 20)}).text_projection.verdict == "correct"
    assert looked(tmp_path, tensors | {name: torch.ones(20, 24)}).text_projection.verdict == "transposed"
    renamed = {k: v for k, v in tensors.items() if k != name} | {name + ".weight": tensors[name]}
    assert looked(tmp_path, renamed).text_projection.verdict == "transposed"
    kohya = looked(tmp_path, tensors, **{"sdxl_train.text_projection": "kohya"}).text_projection
    assert (kohya.verdict, "kohya" in kohya.reason) == ("transposed", True)
    scaled = looked(tmp_path, tensors | {CLIP_G + "logit_scale": torch.tensor(1.0)}).text_projection
    assert "logit_scale is 1" in scaled.reason


def test_a_folder(model_folder: Path) -> None:
    found = inspect(model_folder)
    by_hand = {
        folder.name: load_file(next(folder.glob("*.safetensors")))
        for folder in model_folder.iterdir()
        if list(folder.glob("*.safetensors"))
    }
    for group in found.components:
        assert group.tensors == len(by_hand[group.name])
        assert group.parameters == sum(tensor.numel() for tensor in by_hand[group.name].values())
    assert len(found.files) == 4
    assert found.prediction.source == "scheduler/scheduler_config.json"
    blocks = {group.name for group in found.blocks}
    assert {"input_blocks.0.0", "middle_block.1", "text_encoder_2.layers.3", "vae.decoder.up.0"} <= blocks
    assert "other" not in {group.component for group in found.components}


def test_components_alone(model_folder: Path, tmp_path: Path) -> None:
    vae = inspect(model_folder / "vae")
    assert [group.component for group in vae.components] == ["vae"]
    assert "vae.decoder.mid" in {group.name for group in vae.blocks}
    lora = {"lora_unet_mid_block.lora_down.weight": torch.ones(4, 8), "lora_te1_x.lora_up.weight": torch.ones(8, 4)}
    assert [group.name for group in looked(tmp_path, lora).components] == ["unet", "text_encoder"]


def test_a_pickled_checkpoint(tmp_path: Path) -> None:
    tensors = small_sdxl(torch.bfloat16)
    torch.save({"state_dict": tensors}, tmp_path / "model.ckpt")
    found = inspect(tmp_path / "model.ckpt")
    assert found.identity.kind == "sdxl"
    assert found.files[0].sha256 == hashlib.sha256((tmp_path / "model.ckpt").read_bytes()).hexdigest()
    assert found.numbers is not None
    assert found.numbers.total.largest == max(float(tensor.abs().max()) for tensor in tensors.values())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(tmp_path / "model.safetensors", small_sdxl() | {"v_pred": torch.tensor([])})
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("model.safetensors: an SDXL base model of another size (first width 16 instead of 320)\n")
    assert "v_prediction (marker v_pred)" in shown
    assert hashlib.sha256(path.read_bytes()).hexdigest() in shown
    assert max(map(len, shown.splitlines())) < 200
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identity"]["kind"] == "sdxl"
    assert main(["inspect", str(path), "--quick"]) == 0
    assert "not read (--quick)" in capsys.readouterr().out


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"<html><title>Sign in</title></html>")
    assert main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f'{path} is an HTML page ("Sign in") saved under a model\'s name; download the file itself' in error

"""The commands `export` and `merge` on checkpoints as a run leaves them, models and files."""

import base64
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.model_files.single_files import hash_of_data
from trainer.checkpoint.manifest import MANIFEST, manifest_entry
from trainer.cli.main import main
from trainer.config.load import load_config, to_yaml
from trainer.config.yaml_source import parse
from trainer.model_files.header import read_header
from trainer.model_files.key_map import TEXT_PROJECTION

RIGHT = Path(__file__).parent.parent / "config" / "right.yaml"
WEIGHTS = {"unet": "diffusion_pytorch_model.safetensors", "text_encoder": "model.safetensors"}


@pytest.fixture
def checkpoint(model_folder: Path, tmp_path: Path) -> Path:
    """Step 20 of a run that trained the UNet and the first text encoder; every weight is 1 more than the model's."""
    run = tmp_path / "secret" / "foxes"
    found = run / "checkpoints" / "step-00000020"
    for name, file in WEIGHTS.items():
        shutil.copytree(model_folder / name, found / name)
        save_file(
            {own: tensor + 1 for own, tensor in load_file(model_folder / name / file).items()}, found / name / file
        )
    write_manifest(found)
    values = {"model.path": model_folder, "run.dir": run, "data.buckets.resolution": 768, "data.buckets.max_px": 768}
    config = load_config(RIGHT, [f"{key}={value}" for key, value in values.items()], check_paths=False)
    (run / "config.resolved.yaml").write_text(to_yaml(config))
    for step, colour in ((10, "red"), (20, "green"), (30, "blue")):
        folder = run / "samples" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        Image.new("RGB", (64, 48), colour).save(folder / "00.png")
    return found


def write_manifest(checkpoint: Path) -> None:
    files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != MANIFEST]
    entries = {p.relative_to(checkpoint).as_posix(): manifest_entry(p) for p in files}
    (checkpoint / MANIFEST).write_text(json.dumps({"version": 1, "files": entries}))


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def run(*arguments: object) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def test_a_checkpoint_is_published_with_what_was_not_trained(
    checkpoint: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plain = tmp_path / "foxes-v1.safetensors", tmp_path / "plain.safetensors"
    words = ("--author", "someone", "--license", "CC0-1.0", "--tags", "foxes, snow")
    run("export", checkpoint.parent.parent, "-o", out, *words)
    assert f"wrote {out}" in capsys.readouterr().out
    run("export", model_folder, "-o", plain)
    trained, before = load_file(out), load_file(plain)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float16, torch.int64}
    for name, tensor in trained.items():
        is_trained = name.startswith(("model.diffusion_model.", "conditioner.embedders.0.")) and "_ids" not in name
        difference = tensor.float() - before[name].float()
        assert (difference - float(is_trained)).abs().max() < 2e-3, name
    metadata = read_header(out).metadata
    spec = {name.removeprefix("modelspec."): text for name, text in metadata.items() if name.startswith("modelspec.")}
    assert spec["title"] == "foxes-v1" and spec["author"] == "someone" and spec["license"] == "CC0-1.0"
    assert spec["resolution"] == "768x768" and spec["prediction_type"] == "epsilon"
    assert spec["architecture"] == "stable-diffusion-xl-v1-base" and spec["unet_dtype"] == "float16"
    assert spec["hash_sha256"] == f"0x{hash_of_data(out)}"
    assert metadata["sdxl_train.step"] == "20"
    picture = Image.open(io.BytesIO(base64.b64decode(spec["thumbnail"].removeprefix("data:image/jpeg;base64,"))))
    assert picture.size == (256, 256)
    red, green, blue = picture.getpixel((128, 128))
    assert green > 100 > 50 > max(red, blue)  # the newest samples that are no newer than the checkpoint
    config = parse(metadata["sdxl_train.config"]).value
    assert isinstance(config, dict) and config["train"]["steps"] == 100
    assert "secret" not in metadata["sdxl_train.config"] and config["run"]["dir"] == "foxes"


def test_the_moving_average_is_published_where_there_is_one(
    checkpoint: Path, model_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(model_folder / "unet", checkpoint / "unet_ema")
    write_manifest(checkpoint)
    live, ema = tmp_path / "live.safetensors", tmp_path / "ema.safetensors"
    run("export", checkpoint, "-o", live, "--dtype", "fp32")
    run("export", checkpoint, "-o", ema, "--dtype", "fp32", "--weights", "ema")
    of_live, of_ema = load_file(live), load_file(ema)
    for name, tensor in of_ema.items():
        share = 1 if name.startswith("model.") else 0
        torch.testing.assert_close(of_live[name], tensor + share if share else tensor)
    assert read_header(ema).metadata["sdxl_train.weights"] == "ema"


def test_markers_vae_and_metadata_of_a_file_written_anew(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, folder = tmp_path / "first.safetensors", tmp_path / "second.safetensors", tmp_path / "folder"
    options = ("--prediction-type", "v_prediction", "--ztsnr", "--title", "Foxes", "--kohya-compat")
    run("export", model_folder, "-o", first, "--dtype", "bf16", "--vae-dtype", "fp32", *options)
    assert "v_pred and ztsnr" in capsys.readouterr().out
    header = read_header(first)
    assert header.tensors["v_pred"].shape == header.tensors["ztsnr"].shape == (0,)
    assert header.tensors["first_stage_model.quant_conv.bias"].dtype == "F32"
    assert header.metadata["modelspec.prediction_type"] == "v"
    # The markers, title and dtypes are taken over; the projection is turned back.
    run("export", first, "-o", second, "--dtype", "same", "--from-kohya", "--author", "someone")
    again = read_header(second)
    assert {name: entry.dtype for name, entry in again.tensors.items()} == {
        name: entry.dtype for name, entry in header.tensors.items()
    }
    assert again.metadata["modelspec.title"] == "Foxes" and again.metadata["modelspec.author"] == "someone"
    assert again.metadata["modelspec.hash_sha256"] == f"0x{hash_of_data(second)}"
    assert again.metadata["modelspec.prediction_type"] == "v"
    assert torch.equal(load_file(first)[TEXT_PROJECTION].T, load_file(second)[TEXT_PROJECTION])
    options = ("--layout", "diffusers", "--tokenizer", model_folder, "--vae", model_folder / "vae")
    run("export", second, "-o", folder, "--dtype", "same", *options)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction" and scheduler["rescale_betas_zero_snr"]
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    vae = "diffusion_pytorch_model.safetensors"
    found, wanted = load_file(folder / "vae" / vae), load_file(model_folder / "vae" / vae)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize("prediction", ["v_prediction", "flow", "edm"])
def test_what_the_run_trained_is_what_the_file_says(
    prediction: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the model it started from predicted something else."""
    resolved = checkpoint.parent.parent / "config.resolved.yaml"
    values = [f"objective.prediction={prediction}"]
    values += {"v_prediction": ["objective.zero_terminal_snr=true"], "flow": ["objective.flow.shift=resolution"]}.get(
        prediction, []
    )
    resolved.write_text(to_yaml(load_config(resolved, values, check_paths=False)))
    out, folder = tmp_path / "out.safetensors", tmp_path / "out"
    if prediction == "edm":
        assert "use --layout diffusers" in refused(capsys, "export", checkpoint, "-o", out)
        run("export", checkpoint, "-o", folder, "--layout", "diffusers")
        from diffusers import EDMEulerScheduler

        scheduler = EDMEulerScheduler.from_pretrained(folder / "scheduler")
        assert scheduler.config["sigma_data"] == 0.5 and scheduler.config["prediction_type"] == "epsilon"
        return
    run("export", checkpoint, "-o", out)
    header = read_header(out)
    markers = {"v_pred", "ztsnr"} & set(header.tensors)
    if prediction == "flow":
        assert "ModelSamplingSD3 with shift 3" in capsys.readouterr().out
        assert header.metadata["sdxl_train.flow_shift"] == "3" and not markers
        assert header.metadata["modelspec.prediction_type"] == "flow"
        return
    assert markers == {"v_pred", "ztsnr"} and header.metadata["modelspec.prediction_type"] == "v"
    run("export", checkpoint, "-o", folder, "--layout", "diffusers")
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    told = (scheduler.config["prediction_type"], scheduler.config["rescale_betas_zero_snr"])
    assert told == ("v_prediction", True) and scheduler.config["timestep_spacing"] == "trailing"


def test_a_file_that_says_how_its_projection_stands_is_believed(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right, kohya = tmp_path / "right.safetensors", tmp_path / "kohya.safetensors"
    run("export", model_folder, "-o", right, "--dtype", "same")
    run("export", right, "-o", kohya, "--dtype", "same", "--kohya-compat")
    assert not torch.equal(load_file(right)[TEXT_PROJECTION], load_file(kohya)[TEXT_PROJECTION])
    for name, command in {
        "again": ("export", kohya),
        "merged": ("merge", right, kohya, "--alpha", "0.5"),
    }.items():
        out = tmp_path / f"{name}.safetensors"
        run(*command, "-o", out, "--dtype", "fp32")
        assert torch.equal(load_file(out)[TEXT_PROJECTION], load_file(right)[TEXT_PROJECTION])
        assert read_header(out).metadata["sdxl_train.text_projection"] == "correct"
    out = tmp_path / "out.safetensors"
    assert "says of itself" in refused(capsys, "export", right, "-o", out, "--from-kohya")
    assert "one meaning" in refused(capsys, "export", model_folder, "-o", out, "--from-kohya")


def test_a_lone_mark_of_zero_terminal_snr_is_dropped(model_folder: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run("export", model_folder, "-o", first)
    tensors = load_file(first) | {"ztsnr": torch.tensor([])}
    save_file(tensors, first, dict(read_header(first).metadata))
    run("export", first, "-o", second)
    assert "ztsnr" not in read_header(second).tensors


def test_fp8_is_kept_and_its_faults_are_found(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    run("export", model_folder, "-o", first)
    metadata, name = dict(read_header(first).metadata), "model.diffusion_model.out.2.weight"
    tensors = load_file(first)
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, first, metadata)
    run("export", first, "-o", second, "--dtype", "same")
    assert torch.equal(load_file(second)[name].view(torch.uint8), tensors[name].view(torch.uint8))
    tensors[name].view(torch.uint8).fill_(0x7F)  # NaN
    save_file(tensors, first, metadata)
    assert "the model is broken" in refused(capsys, "export", first, "-o", second, "--dtype", "same", "--overwrite")


def test_mistakes_are_one_line_each(
    checkpoint: Path, model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, lora = tmp_path / "a.safetensors", tmp_path / "lora.safetensors"
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(4, 8)}, lora)
    assert "is a LoRA" in refused(capsys, "export", lora, "-o", out)
    assert "no such file" in refused(capsys, "export", tmp_path / "nothing", "-o", out)
    assert "lora.safetensors: exists" in refused(capsys, "export", model_folder, "-o", lora)
    assert "must end in .safetensors" in refused(capsys, "export", model_folder, "-o", tmp_path / "a")
    assert "--tokenizer: has no effect" in refused(capsys, "export", model_folder, "-o", out, "--tokenizer", tmp_path)
    options = ("--layout", "diffusers", "--title", "Foxes")
    assert "--title: has no effect" in refused(capsys, "export", model_folder, "-o", tmp_path / "a", *options)
    assert "holds no running average" in refused(capsys, "export", checkpoint, "-o", out, "--weights", "ema")
    assert "zero terminal SNR needs" in refused(capsys, "export", model_folder, "-o", out, "--ztsnr")
    assert "is no checkpoint" in refused(capsys, "export", model_folder, "-o", out, "--model", model_folder)
    assert "wanted PATTERN" in refused(
        capsys, "merge", lora, lora, "--alpha", "0.5", "-o", out, "--block", "input_blocks.4"
    )
    assert "from 0 to 1" in refused(capsys, "merge", model_folder, model_folder, "--alpha", "1.5", "-o", out)
    options = ("--layout", "diffusers", "--overwrite")
    assert "and this is none" in refused(capsys, "export", model_folder, "-o", checkpoint.parent.parent, *options)
    assert checkpoint.is_dir()
    assert "a run knows" in refused(capsys, "export", checkpoint, "-o", out, "--from-kohya")
    (checkpoint.parent.parent / "config.resolved.yaml").unlink()
    assert "give --model" in refused(capsys, "export", checkpoint, "-o", out)
    run("export", checkpoint, "-o", out, "--model", model_folder)
    weights = checkpoint / "unet" / WEIGHTS["unet"]
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    line = refused(capsys, "export", checkpoint, "-o", out, "--model", model_folder, "--overwrite")
    assert "is not what was written (checksum)" in line


def test_a_checkpoint_is_merged_with_its_model(checkpoint: Path, model_folder: Path, tmp_path: Path) -> None:
    out, plain = tmp_path / "mild.safetensors", tmp_path / "plain.safetensors"
    run(
        "merge",
        model_folder,
        checkpoint,
        "--alpha",
        "0.25",
        "--block",
        "text_encoder_1=1",
        "--dtype",
        "fp32",
        "-o",
        out,
    )
    run("export", model_folder, "-o", plain, "--dtype", "fp32")
    merged, before = load_file(out), load_file(plain)
    for name, tensor in merged.items():
        share = {"model": 0.25, "conditioner": 1.0 if "embedders.0" in name else 0.0}.get(name.split(".")[0], 0.0)
        share = 0.0 if "position_ids" in name else share
        torch.testing.assert_close(tensor, before[name] + share if share else before[name], rtol=0, atol=1e-5)
    metadata = read_header(out).metadata
    assert metadata["modelspec.merged_from"] == f"{model_folder.name}, foxes step 20"
    assert json.loads(metadata["sdxl_train.merge"])["blocks"] == [["text_encoder_1", 1.0]]
    assert metadata["modelspec.hash_sha256"] == f"0x{hash_of_data(out)}"


def test_models_of_other_predictions_are_not_merged(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "v.safetensors"
    run("export", model_folder, "-o", other, "--prediction-type", "v_prediction")
    line = refused(capsys, "merge", model_folder, other, "--alpha", "0.5", "-o", tmp_path / "a.safetensors")
    assert "predicts epsilon" in line and "v_prediction: their sum would be neither" in line

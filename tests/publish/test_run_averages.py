"""`sdxl-train ema` and the averages that other commands take by name, on a real run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.data.small_set import write_small_set
from tests.train.real_run import run_config, watched_run
from trainer.checkpoint.manifest import MANIFEST, STATE, find_damage, manifest_entry
from trainer.checkpoint.run_dir import RESOLVED_CONFIG, checkpoint_dir
from trainer.cli.keep_running import write_resolved
from trainer.cli.main import main
from trainer.cli.run_target import find_target
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.model_files.header import read_header

pytestmark = pytest.mark.e2e

STEPS = 64
FILE = "diffusion_pytorch_model.safetensors"
AVERAGES: list[dict[str, Any]] = [
    {"name": "ema", "decay": 0.9},
    *({"name": f"p{length}", "kind": "power", "length": length / 100} for length in (5, 10, 7, 15)),
]
EMA = {"averages": AVERAGES, "snapshots": {"every_steps": 8}}


@pytest.fixture(scope="module")
def run_dir(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 64 steps that stored averages of four lengths; those of 0.07 and 0.15 are taken out afterwards."""
    folder = tmp_path_factory.mktemp("averaged")
    root = write_small_set(folder / "prepared", {Bucket(64, 64): 8})
    fields = json.loads(run_config(model_folder, root, folder / "run", steps=STEPS).model_dump_json(exclude_unset=True))
    config = Config.model_validate(fields | {"ema": EMA, "checkpoint": {"every_steps": 32}})
    write_resolved(config, config.run.dir)
    watched_run(config)
    for state in (folder / "run").glob("*/step-*/training_state/state.json"):
        record = json.loads(state.read_text())
        record["ema"]["averages"] = {n: e for n, e in record["ema"]["averages"].items() if n not in ("p7", "p15")}
        state.write_text(json.dumps(record))
        manifest = state.parents[1] / MANIFEST
        listed = json.loads(manifest.read_text())
        listed["files"][STATE] = manifest_entry(state)
        manifest.write_text(json.dumps(listed))
    return folder / "run"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(("length", "tracked", "most"), [("0.07", "p7", 1e-3), ("0.15", "p15", 5e-3)])
def test_another_length_is_that_which_was_tracked(
    run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, length: str, tracked: str, most: float
) -> None:
    """The error, as a share of what the average moved since step 8, is far below the profile's, which is told."""
    told = run(capsys, "ema", run_dir, "--length", length, "-o", tmp_path)
    assert f"length {length} at step 64 from 16 stored averages of length 0.05 and 0.1, steps 8 to 64" in told
    out = tmp_path / f"step-{STEPS:08d}-length-{length}"
    assert f"wrote {out}" in told and find_damage(out) is None
    newest = checkpoint_dir(run_dir, STEPS)
    found, expected, start = (load_file(place / FILE) for place in (
        out / "unet", newest / f"unet_{tracked}", run_dir / f"ema/step-00000008/unet_{tracked}"))  # fmt: skip
    distance, moved = 0.0, 0.0
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        distance += float((found[name].double() - tensor).square().sum())
        moved += float((start[name].double() - tensor).square().sum())
    assert distance**0.5 < most * moved**0.5
    assert (out / "unet" / "config.json").read_bytes() == (newest / "unet" / "config.json").read_bytes()


def test_what_it_writes_is_taken_as_a_checkpoint(
    run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run(capsys, "ema", run_dir, "--length", "0.06", "--step", "32")
    out = run_dir / "averages" / "step-00000032-length-0.06"
    assert find_target(out) == (run_dir / RESOLVED_CONFIG, out)
    assert "exists" in refused(capsys, "ema", run_dir, "--length", "0.06", "--step", "32")
    file = tmp_path / "average.safetensors"
    run(capsys, "export", out, "-o", file, "--dtype", "fp32")
    weights = load_file(out / "unet" / FILE)["conv_in.weight"]
    assert torch.equal(load_file(file)["model.diffusion_model.input_blocks.0.0.weight"], weights)
    metadata = read_header(file).metadata
    assert metadata["sdxl_train.weights"] == "average of length 0.06" and metadata["sdxl_train.step"] == "32"


def test_averages_are_taken_by_name(run_dir: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    run(capsys, "export", run_dir, "-o", file, "--dtype", "fp32", "--weights", "ema")
    weights = load_file(checkpoint_dir(run_dir, STEPS) / "unet_ema" / FILE)["conv_in.weight"]
    assert torch.equal(load_file(file)["model.diffusion_model.input_blocks.0.0.weight"], weights)
    for command in (("export", run_dir, "-o", tmp_path / "b.safetensors"), ("eval", run_dir), ("sample", run_dir)):
        assert "did you mean `ema`?" in refused(capsys, *command, "--weights", "emma")
        assert "it holds live, ema, p10, p15, p5, p7" in refused(capsys, *command, "--weights", "other")


def test_mistakes_are_one_line_each(
    run_dir: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    told = run(capsys, "ema", run_dir)
    assert "length 0.05: stored at 8 steps, 8, 16, 24, 32, 40, 48, 56, 64" in told
    assert "below 0.289" in refused(capsys, "ema", run_dir, "--length", "0.3", "-o", tmp_path)
    assert "nothing is stored of it; steps are 8, 16" in refused(capsys, "ema", run_dir, "--length", "0.1", "--step", 9)
    assert "no such folder" in refused(capsys, "ema", tmp_path / "no", "--length", "0.1")
    for arguments in ((), ("--length", "0.1")):
        assert "holds no power average" in refused(capsys, "ema", tmp_path, *arguments)
    snapshot = run_dir / "ema" / "step-00000016"
    stored = snapshot / "unet_p5" / FILE
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "(checksum)" in refused(capsys, "ema", run_dir, "--length", "0.08", "-o", tmp_path)
    stored.write_bytes(whole)
    assert not any(path.name.startswith("step") for path in tmp_path.iterdir())
    assert (snapshot / MANIFEST).is_file()

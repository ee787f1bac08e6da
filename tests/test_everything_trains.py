"""Whole commands where the text encoders train too and the model is spread over the workers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_end_to_end import config_file, photos, sdxl_train  # noqa: F401 - fixtures

pytestmark = pytest.mark.e2e

EVERYTHING = [
    "launch.workers=2",
    "memory.strategy=zero2",
    "train.precision=bf16",
    "trainable.text_encoder_1.train=true",
    "trainable.text_encoder_2.train=true",
    "trainable.text_encoder_2.lr=1e-4",
    "trainable.text_encoder_2.freeze=[embeddings]",
    "trainable.unet.freeze=[input_blocks.1, middle_block.2]",
    "captions.max_tokens=150",
    "captions.chunks=kohya",
    "validation.every_steps=4",
    "samples.every_steps=4",
    "samples.count=3",
    "samples.steps=2",
]
WEIGHTS = ("unet/diffusion_pytorch_model", "text_encoder/model", "text_encoder_2/model")


def weights(run_dir: Path, step: int) -> dict[str, dict[str, torch.Tensor]]:
    folder = run_dir / f"checkpoints/step-{step:08d}"
    return {name.split("/")[0]: load_file(folder / f"{name}.safetensors") for name in WEIGHTS}


def test_a_spread_model_stops_goes_on_and_changes_its_workers(
    tmp_path: Path,
    config_file: Path,  # noqa: F811
    model_folder: Path,
) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    done = sdxl_train(config_file, *EVERYTHING, f"run.dir={straight}", "checkpoint.every_steps=4")
    assert "text_encoder_1" in done.stderr and "zero2" in done.stderr
    for steps in (4, 8):  # stopped after step 4, and then gone on
        sdxl_train(config_file, *EVERYTHING, f"run.dir={resumed}", f"train.steps={steps}")
    expected, found = weights(straight, 8), weights(resumed, 8)
    for part, tensors in expected.items():
        assert all(torch.equal(found[part][name], tensor) for name, tensor in tensors.items()), part

    start = {name.split("/")[0]: load_file(model_folder / f"{name}.safetensors") for name in WEIGHTS}
    moved = {
        part: {name for name, tensor in tensors.items() if not torch.equal(tensor, start[part][name])}
        for part, tensors in expected.items()
    }
    last = max(int(name.split(".layers.")[1].split(".")[0]) for name in start["text_encoder"] if ".layers." in name)
    unused = {n for n in start["text_encoder"] if f"encoder.layers.{last}." in n or "final_layer_norm" in n}
    assert moved["text_encoder"] == set(start["text_encoder"]) - unused
    assert moved["text_encoder_2"] == {n for n in start["text_encoder_2"] if "embeddings." not in n}
    frozen = ("down_blocks.0.resnets.0.", "mid_block.resnets.1.")
    assert moved["unet"] == {n for n in start["unet"] if not n.startswith(frozen)}

    sdxl_train(config_file, *EVERYTHING, f"run.dir={resumed}", "train.steps=10", "launch.workers=3")
    records = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records if record["kind"] == "train"]
    assert steps == list(range(1, 11))
    sdxl_train("eval", resumed, "samples.steps=2")
    assert (resumed / "eval/step-00000010/samples.png").is_file()


def test_names_that_mean_nothing_are_one_line(tmp_path: Path, config_file: Path) -> None:  # noqa: F811
    done = sdxl_train(config_file, f"run.dir={tmp_path}", "trainable.unet.freeze=[input_block.1]", expect=2)
    line = "trainable.unet.freeze: `input_block.1` is the beginning of no weight's name; did you mean `input_blocks.1`?"
    assert line in done.stderr

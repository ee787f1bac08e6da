"""Whole commands where the text encoders train too and the model is spread over the workers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.test_end_to_end import config_file, photos  # noqa: F401 - fixtures
from tests.warm_processes import sdxl_train

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


IN_TURN = [
    "launch.workers=2",
    "memory.strategy=zero2",
    "trainable.unet.lr_scale={attn2: 0.5, input_blocks.0: 0}",
    "trainable.text_encoder_1={train: true, stop_at: 0.5}",
    "trainable.text_encoder_2={train: true, start_at: 5}",
    "ema.averages=[{kind: plain}]",
]


@pytest.mark.slow
def test_parts_that_train_in_turn_are_the_same_over_kills(
    tmp_path: Path,
    config_file: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One stops after step 4 and one starts after step 5, of 8; a worker is killed in the step after each."""
    straight = tmp_path / "straight"
    done = sdxl_train(config_file, *IN_TURN, f"run.dir={straight}")
    assert "text_encoder_1: rests" in done.stderr and "text_encoder_2: rests" in done.stderr
    expected = weights(straight, 8)
    for step in (5, 6):
        monkeypatch.setenv("FAULT", f"kill@1:{step}")
        killed = tmp_path / f"killed-{step}"
        sdxl_train(config_file, *IN_TURN, f"run.dir={killed}")
        assert f"starting again from step-{step - 1:08d}" in (killed / "events.txt").read_text()
        for folder in ("text_encoder", "text_encoder_2"):
            assert (killed / f"checkpoints/step-00000008/{folder}_ema").is_dir()
        for part, tensors in weights(killed, 8).items():
            assert all(torch.equal(expected[part][name], tensor) for name, tensor in tensors.items()), part
        records = [json.loads(line) for line in (killed / "metrics.jsonl").read_text().splitlines()]
        assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 9))


def test_plan_shows_what_trains_by_block(tmp_path: Path, config_file: Path) -> None:  # noqa: F811
    options = ["trainable.unet.lr_scale={attn2: 0.5}", "trainable.unet.freeze=[time_embed]", "trainable.unet.stop_at=6"]
    options += ["trainable.text_encoder_1={train: true, layer_decay: 0.5}"]
    lines = sdxl_train("plan", config_file, f"run.dir={tmp_path}", *options).stdout.splitlines()
    begin = next(number for number, line in enumerate(lines) if line.split()[:1] == ["unet"])
    rows = {line.split()[0]: line.split()[1:] for line in lines[begin : begin + 25]}
    assert rows["unet"] == ["weights", "trained", "share", "lr", "scale"]
    assert rows["time_embed"][1:] == ["0", "0.0%", "-"]
    assert rows["middle_block"][2:] == ["100.0%", "0.5", "to", "1"]
    assert rows["input_blocks.0"][2:] == ["100.0%", "1"]
    assert rows["encoder.layers.0"][2:] == ["100.0%", "0.25"] and rows["encoder.layers.1"][2:] == ["100.0%", "0.5"]
    assert rows["encoder.layers.2"][1:] == ["0", "0.0%", "-"]
    assert "unet: trains until step 6" in lines


def test_names_that_mean_nothing_are_one_line(tmp_path: Path, config_file: Path) -> None:  # noqa: F811
    done = sdxl_train(config_file, f"run.dir={tmp_path}", "trainable.unet.freeze=[input_block.1]", expect=2)
    line = "trainable.unet.freeze: `input_block.1` is the beginning of no weight's name; did you mean `input_blocks.1`?"
    assert line in done.stderr

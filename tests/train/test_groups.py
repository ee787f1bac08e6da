"""The optimizer's groups in a real run, against AdamW written out in float64 with a rate for each parameter."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.data.small_set import write_small_set
from tests.train.real_run import ALONE, model_of, run_config, watched_run
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.measure.telemetry import read_metrics
from trainer.optim.optimizers import scale_lr
from trainer.train.build import build_run
from trainer.train.step import StepParts

pytestmark = pytest.mark.e2e

STEPS, LR, TEXT_LR = 5, 1e-3, 3e-4
TRAINABLE = {
    "unet": {
        "lr_scale": {"attn2": 0.5, "attn2.to_k": 2.0, "input_blocks.0*": 0},
        "layer_decay": 0.9,
        "weight_decay": 0.1,
        "weight_decay_scale": {"proj_in": 0, "ff": 3.0},
    },
    "text_encoder_1": {"train": True, "lr": TEXT_LR, "only": ["encoder.layers.0", "mlp"], "layer_decay": 0.8},
}
# How far from the output, of the blocks of the tests' UNet.
DISTANCES = {
    "conv_norm_out": 0, "conv_out": 0, "up_blocks.1.resnets.1": 1, "up_blocks.1.resnets.0": 2,
    "up_blocks.0.resnets.1": 3, "up_blocks.0.attentions.1": 3, "up_blocks.0.upsamplers": 3,
    "up_blocks.0.resnets.0": 4, "up_blocks.0.attentions.0": 4, "mid_block": 5,
    "down_blocks.1": 6, "down_blocks.0.downsamplers": 7, "down_blocks.0.resnets": 8,
    "time_embedding": 10, "add_embedding": 10,
}  # fmt: skip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("groups") / "prepared", {Bucket(64, 64): 8})


def configured(model: Path, prepared: Path, run_dir: Path, trainable: dict[str, Any], **optimizer: Any) -> Config:
    fields = json.loads(run_config(model, prepared, run_dir, steps=STEPS).model_dump_json(exclude_unset=True))
    fields["train"] |= {"max_grad_norm": 0}
    fields["optimizer"] |= optimizer
    schedule = {"kind": "cosine", "warmup_steps": 1, "final_ratio": 0.1}
    return Config.model_validate(fields | {"trainable": trainable, "lr_schedule": schedule})


def rates_by_hand(name: str, dim: int) -> tuple[float, float]:
    """Peak learning rate and weight decay."""
    if name.startswith("text_encoder_1."):
        layer = int(name.split("encoder.layers.")[1].split(".")[0])
        return TEXT_LR * 0.8 ** (2 - layer), 0.05 if dim > 1 else 0.0  # of 3 layers, the last one is not used
    own = name.removeprefix("unet.")
    (distance,) = {d for block, d in DISTANCES.items() if own.startswith(f"{block}.")}
    scale = 2.0 if ".attn2.to_k." in own else 0.5 if ".attn2." in own else 1.0
    decay = 0.0 if dim < 2 or ".proj_in." in own else 0.3 if ".ff." in own else 0.1
    return LR * scale * 0.9**distance, decay


def test_a_run_follows_adamw_in_float64(model_folder: Path, prepared: Path, tmp_path: Path) -> None:
    more = {"weight_decay": 0.05, "decay_norms_and_biases": False}
    config = configured(model_folder, prepared, tmp_path / "run", TRAINABLE, **more)
    expected: dict[str, torch.Tensor] = {}
    first: dict[str, torch.Tensor] = {}
    second: dict[str, torch.Tensor] = {}
    found: dict[str, torch.nn.Parameter] = {}

    def factor(step: int) -> float:
        if step < 1:
            return (step + 1) / 2
        return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 1) / (STEPS - 2))) / 2

    def note(name: str, parameter: torch.nn.Parameter, now: list[int]) -> None:
        assert parameter.grad is not None
        g, t = parameter.grad.double(), now[0] + 1
        first[name] = 0.9 * first.get(name, 0.0) + 0.1 * g
        second[name] = 0.999 * second.get(name, 0.0) + 0.001 * g * g
        lr, decay = rates_by_hand(name, parameter.dim())
        update = first[name] / (1 - 0.9**t) / ((second[name] / (1 - 0.999**t)).sqrt() + 1e-8)
        expected[name] = expected[name] - lr * factor(now[0]) * (update + decay * expected[name])

    now = [0]

    def before(step: int, parts: StepParts) -> None:
        now[0] = step
        for name, parameter in parts.strategy.parameters.items() if step == 0 else ():
            found[name], expected[name] = parameter, parameter.detach().double()
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: note(name, p, now))

    watched_run(config, before_parts=before)
    assert len(expected) > 100
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=0, atol=2e-6, msg=name)
    assert not {"unet.conv_in.weight", "unet.conv_in.bias"} & found.keys()
    texts = {name.split("encoder.layers.")[1][0] for name in found if name.startswith("text_encoder_1.")}
    assert texts == {"0", "1"}
    shown = [record["lr"] for record in read_metrics(config.run.dir) if record["kind"] == "train"]
    assert shown == pytest.approx([LR * factor(step) for step in range(STEPS)], rel=1e-6), "of the part, not of a group"


def test_groups_are_parts_and_go_by_schedules_of_parts(model_folder: Path, prepared: Path, tmp_path: Path) -> None:
    config = configured(model_folder, prepared, tmp_path / "run", TRAINABLE)
    optimizer = build_run(config, model_of(config), ALONE).parts.optimizer
    names = [group["name"] for group in optimizer.param_groups]
    assert names[0] == "unet" and len(set(names)) == len(names)
    assert {name.partition(" ")[0] for name in names} == {"unet", "text_encoder_1"}
    rates = scale_lr(optimizer, {"unet": 0.5, "text_encoder_1": 0.0, "unet decay 0.0": 0.25})
    assert rates["unet"] == 0.5 * LR
    assert {rate for name, rate in rates.items() if name.startswith("text_encoder_1")} == {0.0}


def test_without_these_options_there_is_a_group_for_each_part(
    model_folder: Path, prepared: Path, tmp_path: Path
) -> None:
    trainable = {"text_encoder_1": {"train": True, "lr": TEXT_LR}}
    config = configured(model_folder, prepared, tmp_path / "run", trainable, weight_decay=0.02)
    optimizer = build_run(config, model_of(config), ALONE).parts.optimizer
    told = [(group["name"], group["peak_lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert told == [("unet", LR, 0.02), ("text_encoder_1", TEXT_LR, 0.02)]


def test_a_scale_of_zero_is_freezing(model_folder: Path, prepared: Path, tmp_path: Path) -> None:
    """The same run to the bit as with `freeze`, and nothing of it in the optimizer's state."""
    patterns = ["attn2", "input_blocks.0"]
    frozen = configured(model_folder, prepared, tmp_path / "frozen", {"unet": {"freeze": patterns}})
    scaled = configured(model_folder, prepared, tmp_path / "scaled", {"unet": {"lr_scale": dict.fromkeys(patterns, 0)}})
    for config in (frozen, scaled):
        watched_run(config)
    one, other = (checkpoint_dir(config.run.dir, STEPS) for config in (frozen, scaled))
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    assert files == sorted(path.relative_to(other) for path in other.rglob("*.safetensors")) and len(files) == 2
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes()
    state = load_file(one / "training_state/optimizer.safetensors")
    assert state and not [name for name in state if ".attn2." in name or "conv_in" in name]

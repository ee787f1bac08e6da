"""Averages of a real run: what its checkpoints hold of them, after an interruption too, and what is scored."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from tests.data.small_set import write_small_set
from tests.train.real_run import ALONE, model_of, run_config, watched_run
from trainer.checkpoint.ema_folders import SNAPSHOTS, averages_in
from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.run_dir import checkpoint_dir, list_checkpoints, read_state
from trainer.checkpoint.write import WEIGHTS_FILES
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError
from trainer.measure.telemetry import read_metrics
from trainer.optim.ema_profile import PlainEma, PowerEma, Profile
from trainer.train import loop
from trainer.train.build import load_denoiser, make_scorer
from trainer.train.step import StepParts, StepResult, train_step

pytestmark = pytest.mark.e2e

ENTRIES: list[dict[str, Any]] = [
    {"name": "ema", "kind": "plain", "decay": 0.97},
    {"name": "constant", "kind": "plain", "decay": 0.97, "warm_up": False},
    {"name": "short", "kind": "power", "length": 0.05},
    {"name": "long", "kind": "power", "length": 0.1},
]
PROFILES: dict[str, Profile] = {
    "ema": PlainEma(0.97),
    "constant": PlainEma(0.97, warms_up=False),
    "short": PowerEma(0.05),
    "long": PowerEma(0.1),
}
Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("averages") / "prepared", {Bucket(64, 64): 8})


@pytest.fixture
def configured(model_folder: Path, prepared: Path, tmp_path: Path) -> Callable[..., Config]:
    """A configuration of so many steps, with a section `ema` and others."""

    def make(name: str, steps: int, ema: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Config:
        config = run_config(model_folder, prepared, tmp_path / name, steps=steps)
        fields = json.loads(config.model_dump_json(exclude_unset=True))
        for section, values in {**sections, **({"ema": ema} if ema else {})}.items():
            fields[section] = fields.get(section, {}) | values
        return Config.model_validate(fields)

    return make


def trajectory_of(config: Config) -> list[Weights]:
    """Train; the weights of the start and after each step, in float64."""
    found: list[Weights] = []

    def wide(parts: StepParts) -> Weights:
        return {name: p.detach().double().clone() for name, p in parts.strategy.parameters.items()}

    def step(parts: StepParts, *rest: Any, **named: Any) -> StepResult:
        if not found:
            found.append(wide(parts))
        result = train_step(parts, *rest, **named)
        found.append(wide(parts))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        loop.train(config, model_of(config), ALONE, lambda: False)
    return found


def in_float64(trajectory: list[Weights], profile: Profile) -> Weights:
    """The definition."""
    average = dict(trajectory[0])
    for step, weights in enumerate(trajectory[1:], start=1):
        decay = profile.decay_at(step)
        average = {name: decay * value + (1 - decay) * weights[name] for name, value in average.items()}
    return average


def stored(config: Config, step: int, folder: str) -> Weights:
    file = checkpoint_dir(config.run.dir, step) / folder / "diffusion_pytorch_model.safetensors"
    return {f"unet.{name}": tensor for name, tensor in load_file(file).items()}


def assert_same_checkpoints(one: Path, other: Path) -> None:
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(other) for path in other.rglob("*") if path.is_file())
    for file in files:
        if file.name == "optimizer.safetensors":  # its tensors are in another order after a resume
            assert_same_tensors(load_file(one / file), load_file(other / file))
        elif file.name != MANIFEST:
            assert (one / file).read_bytes() == (other / file).read_bytes(), file


def assert_same_tensors(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_hundred_steps_equal_float64(configured: Callable[..., Config]) -> None:
    config = configured("run", 100, {"averages": ENTRIES})
    trajectory = trajectory_of(config)
    live = stored(config, 100, "unet")
    assert averages_in(checkpoint_dir(config.run.dir, 100)) == sorted(PROFILES)
    for name, profile in PROFILES.items():
        found, expected = stored(config, 100, f"unet_{name}"), in_float64(trajectory, profile)
        assert found.keys() == live.keys() == expected.keys()
        moved = 0.0
        for key, tensor in found.items():
            assert tensor.dtype == torch.float32
            error = (tensor.double() - expected[key]).norm()
            assert error <= 1e-6 * expected[key].norm(), (name, key)
            moved += float((tensor - live[key]).norm() > 1e-4 * live[key].norm())
        assert moved > 0.9 * len(found), f"{name} is the weights"


@pytest.mark.parametrize(("place", "every"), [("device", 1), ("host", 3)])
def test_an_interrupted_run_ends_with_the_same_bits(configured: Callable[..., Config], place: str, every: int) -> None:
    """Stopped after 5 steps, of which 3 are averaged where every third is."""
    ema = {"averages": ENTRIES, "place": place, "update_every": every}
    straight, interrupted = configured("straight", 10, ema), configured("interrupted", 10, ema)
    watched_run(straight)
    watched_run(interrupted, stop_after=5)
    middle = read_state(checkpoint_dir(interrupted.run.dir, 5))["ema"]
    assert isinstance(middle, dict) and middle["averages"]["short"]["steps"] == 5 // every * every
    watched_run(interrupted)
    assert_same_checkpoints(checkpoint_dir(straight.run.dir, 10), checkpoint_dir(interrupted.run.dir, 10))


def test_without_averages_the_run_is_the_same(configured: Callable[..., Config]) -> None:
    plain = configured("plain", 6)
    config = configured("averaged", 6, {"averages": [{}]})
    watched_run(plain)
    watched_run(config)
    ours, theirs = checkpoint_dir(config.run.dir, 6), checkpoint_dir(plain.run.dir, 6)
    for file in ("unet/diffusion_pytorch_model.safetensors", "training_state/optimizer.safetensors"):
        assert (ours / file).read_bytes() == (theirs / file).read_bytes()
    assert not averages_in(theirs) and "ema" not in read_state(theirs)


def test_averages_come_and_go_with_a_line(configured: Callable[..., Config], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    watched_run(configured("run", 3))
    one = {"averages": ENTRIES[:1], "update_every": 2}
    watched_run(configured("run", 5, one))
    assert "average ema: begins at step 3, as the weights are now" in caplog.text
    state = read_state(checkpoint_dir(configured("run", 5).run.dir, 5))["ema"]
    assert state == {"step": 4, "averages": {"ema": PROFILES["ema"].to_json() | {"began_at": 3, "steps": 1}}}
    caplog.clear()
    more = configured("run", 7, {"averages": [ENTRIES[0], ENTRIES[2]]})
    watched_run(more)
    assert "average short: begins at step 5" in caplog.text and "average ema" not in caplog.text
    found: Any = read_state(checkpoint_dir(more.run.dir, 7))["ema"]
    assert {name: (each["began_at"], each["steps"]) for name, each in found["averages"].items()} == {
        "ema": (3, 4),
        "short": (5, 2),
    }
    caplog.clear()
    other = configured("run", 9, {"averages": [ENTRIES[2] | {"length": 0.1}]})
    with pytest.raises(UserError, match=r"ema\.averages: .* short is power of length 0\.05, and .* 0\.1 is asked"):
        watched_run(other)
    watched_run(configured("run", 8))
    assert "averages ema, short: given up" in caplog.text


def test_a_step_that_changed_nothing_is_left_out(configured: Callable[..., Config]) -> None:
    """The third of six steps overflows."""
    config, number = configured("run", 6, {"averages": ENTRIES}), 0
    trajectory: list[Weights] = []

    def step(parts: StepParts, *rest: Any, **named: Any) -> StepResult:
        nonlocal number
        number += 1
        if number == 1:
            trajectory.append({n: p.detach().double().clone() for n, p in parts.strategy.parameters.items()})
        result = train_step(parts, *rest[:-1], float("inf") if number == 3 else 1.0, **named)
        if number != 3:
            trajectory.append({n: p.detach().double().clone() for n, p in parts.strategy.parameters.items()})
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        loop.train(config, model_of(config), ALONE, lambda: False)
    assert len(trajectory) == 6
    found: Any = read_state(checkpoint_dir(config.run.dir, 6))["ema"]
    assert {each["steps"] for each in found["averages"].values()} == {5}
    for name, profile in PROFILES.items():
        expected = in_float64(trajectory, profile)
        for key, tensor in stored(config, 6, f"unet_{name}").items():
            assert (tensor.double() - expected[key]).norm() <= 1e-6 * expected[key].norm(), (name, key)


def test_text_encoders_and_frozen_weights(configured: Callable[..., Config], model_folder: Path) -> None:
    """An average is a whole component: what is frozen is as it is. What trains later has been its own average."""
    encoder = {"train": True}
    frozen = {"text_encoder_1": encoder, "text_encoder_2": encoder, "unet": {"freeze": ["conv_in"]}}
    config = configured("run", 4, {"averages": [ENTRIES[2]]}, trainable=frozen)
    watched_run(config)
    checkpoint = checkpoint_dir(config.run.dir, 4)
    for folder, file in WEIGHTS_FILES.items():
        if folder in ("adapter", "new_tokens"):
            continue
        average, live = load_file(checkpoint / f"{folder}_short" / file), load_file(checkpoint / folder / file)
        assert average.keys() == live.keys()
        same = {name for name, tensor in average.items() if torch.equal(tensor, live[name])}
        if folder == "unet":
            assert {"conv_in.weight", "conv_in.bias"} <= same
        assert len(same) < 0.5 * len(live), f"{folder}: averages are the weights"
        assert (checkpoint / f"{folder}_short/config.json").read_text() == (
            checkpoint / folder / "config.json"
        ).read_text()
    found = UNet2DConditionModel.from_pretrained(checkpoint / "unet_short", local_files_only=True)
    assert torch.equal(found.state_dict()["conv_out.weight"], stored(config, 4, "unet_short")["unet.conv_out.weight"])
    more = configured("run", 5, {"averages": [ENTRIES[2]]}, trainable=frozen | {"unet": {}})
    watched_run(more)
    before, after = stored(more, 4, "unet")["unet.conv_in.bias"], stored(more, 5, "unet")["unet.conv_in.bias"]
    expected = before.lerp(after, 1 - PROFILES["short"].decay_at(5))
    assert not torch.equal(before, after)
    torch.testing.assert_close(stored(more, 5, "unet_short")["unet.conv_in.bias"], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("precision", ["fp32", "bf16_kahan"])
def test_validation_and_samples_look_at_what_is_named(
    configured: Callable[..., Config],
    tmp_path: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loss of an average during the run is that of the checkpoint's; the run takes the way it takes without."""
    drawn: list[str] = []
    monkeypatch.setattr("trainer.evaluate.scoring.Scorer.draw", lambda self, folder, title: drawn.append(folder.name))
    root = write_small_set(tmp_path / "held-out", {Bucket(64, 64): 8})
    text = (root / "snapshots/000001.json").read_text()
    assert text.count('"train"') == 2
    (root / "snapshots/000001.json").write_text(text.replace('"train","train"', '"train","validation"'))
    data = {"prepared": str(root)}
    scored = {"validation": {"every_steps": 4, "timesteps": [500]}, "samples": {"every_steps": 4}}
    train = {"precision": precision}
    ema = {"averages": ENTRIES[:3]}
    config = configured("scored", 4, ema | {"score": ["live", "short"]}, train=train, data=data, **scored)
    silent = configured("silent", 4, ema, train=train, data=data)
    watched_run(config)
    watched_run(silent)
    assert drawn == ["step-00000004", "step-00000004-short"]
    one, other = (checkpoint_dir(each.run.dir, 4) for each in (config, silent))
    assert_same_checkpoints(one, other)
    records = {(r["kind"], r["step"]): r["loss"] for r in read_metrics(config.run.dir) if "validation" in r["kind"]}
    assert records["validation", 4] != records["validation_short", 4]
    assert records["validation", 0] == records["validation_short", 0]
    for kind, average in (("validation", "live"), ("validation_short", "short")):
        held_out = PreparedSet.open(root)
        denoiser = load_denoiser(config, model_of(config), one, average, held_out, ALONE.device)
        result = make_scorer(config, model_of(config), ALONE, denoiser, held_out).validate()
        assert result.loss == pytest.approx(records[kind, 4], rel=1e-6)


def test_snapshots_are_kept_and_those_of_a_lost_way_deleted(configured: Callable[..., Config]) -> None:
    ema = {"averages": ENTRIES[1:3], "snapshots": {"every_steps": 2, "keep": 3, "dtype": "fp16"}}
    config = configured("run", 9, ema, checkpoint={"every_steps": 4})
    watched_run(config)
    snapshots = list_checkpoints(config.run.dir, SNAPSHOTS)
    assert [path.name for path in snapshots] == ["step-00000004", "step-00000006", "step-00000008"]
    for path in snapshots:
        assert averages_in(path) == ["short"]
    kept = load_file(snapshots[-1] / "unet_short" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float16}
    whole = stored(config, 8, "unet_short")
    assert all(torch.equal(tensor, whole[f"unet.{name}"].half()) for name, tensor in kept.items())
    again = configured("run", 5, ema, run={"resume": str(checkpoint_dir(config.run.dir, 4))})
    watched_run(again)
    assert [path.name for path in list_checkpoints(config.run.dir, SNAPSHOTS)] == ["step-00000004"]

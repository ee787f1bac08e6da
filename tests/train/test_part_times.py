"""Parts of the model that start or stop training within the run: when, and to the bit over interruptions."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.data.small_set import write_small_set
from tests.train.real_run import ALONE, model_of, run_config, watched_run
from tests.train.test_averages import assert_same_checkpoints
from trainer.checkpoint.run_dir import checkpoint_dir, list_checkpoints, read_state
from trainer.checkpoint.write import WEIGHTS_FILES
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.errors import UserError
from trainer.train.build import build_run
from trainer.train.saved.part_times import PartTimes, part_times, resting_parts
from trainer.train.step import StepParts

pytestmark = pytest.mark.e2e

ENCODER_1 = {"train": True, "stop_at": 3}
ENCODER_2 = {"train": True, "start_at": 0.25}  # of 8 steps: after 2
STRETCHES = {"text_encoder_1": ENCODER_1, "text_encoder_2": ENCODER_2, "unet": {"freeze": ["conv_in"]}}
WHOLE = {"text_encoder_1": {"train": True}, "text_encoder_2": {"train": True}, "unet": {"freeze": ["conv_in"]}}
AVERAGES = {"averages": [{"name": "short", "kind": "power", "length": 0.1}]}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("times") / "prepared", {Bucket(64, 64): 8})


@pytest.fixture
def configured(model_folder: Path, prepared: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(name: str, trainable: dict[str, Any], steps: int = 8, **sections: dict[str, Any]) -> Config:
        fields = json.loads(
            run_config(model_folder, prepared, tmp_path / name, steps=steps).model_dump_json(exclude_unset=True)
        )
        for section, values in sections.items():
            fields[section] = fields.get(section, {}) | values
        return Config.model_validate(fields | {"trainable": trainable})

    return make


def stored(config: Config, step: int, folder: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoint_dir(config.run.dir, step) / folder / WEIGHTS_FILES[folder.removesuffix("_short")])


def moments(config: Config, step: int) -> set[str]:
    """The parts of the model that a checkpoint has optimizer state of."""
    file = checkpoint_dir(config.run.dir, step) / "training_state/optimizer.safetensors"
    return {name.split(".")[0] for name in load_file(file)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], tensor) for name, tensor in other.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16_kahan"])
def test_a_part_that_rests_is_as_if_it_had_no_gradients(configured: Callable[..., Config], precision: str) -> None:
    """Against one model throughout, whose parameters that rest have their gradients taken away as they arrive."""
    train = {"precision": precision}
    config = configured("stretches", STRETCHES, ema=AVERAGES, train=train, checkpoint={"every_steps": 1, "keep": 9})
    whole = configured("whole", WHOLE, ema=AVERAGES, train=train)
    watched = watched_run(config)

    now = 0

    def take_away(part: str, parameter: torch.Tensor) -> None:
        if part != "unet" and not (now < 3 if part == "text_encoder_1" else now >= 2):
            parameter.grad = None

    def by_hand(step: int, parts: StepParts) -> None:
        nonlocal now
        now = step
        for name, parameter in parts.strategy.parameters.items() if step == 0 else ():
            parameter.register_post_accumulate_grad_hook(partial(take_away, name.split(".")[0]))

    expected = watched_run(whole, before_parts=by_hand)
    assert [result.grad_norm for result in watched.results] == [result.grad_norm for result in expected.results]
    assert [result.loss for result in watched.results] == [result.loss for result in expected.results]
    for folder in WEIGHTS_FILES.keys() - {"adapter", "new_tokens"}:
        assert same(stored(config, 8, folder), stored(whole, 8, folder)), folder
        if (
            precision == "fp32" or folder != "text_encoder"
        ):  # what Kahan keeps beside the weights rests with the moments
            assert same(stored(config, 8, f"{folder}_short"), stored(whole, 8, f"{folder}_short")), folder
    assert same(stored(config, 2, "text_encoder_2"), stored(config, 1, "text_encoder_2"))
    assert not same(stored(config, 3, "text_encoder_2"), stored(config, 2, "text_encoder_2"))
    assert not same(stored(config, 3, "text_encoder"), stored(config, 2, "text_encoder"))
    assert same(stored(config, 8, "text_encoder"), stored(config, 3, "text_encoder"))
    assert not same(stored(config, 8, "text_encoder_short"), stored(config, 3, "text_encoder_short")), "it follows"
    found = [moments(config, step) for step in range(1, 9)]
    assert found[:2] == [{"unet", "text_encoder_1"}] * 2
    assert found[2:] == [{"unet", "text_encoder_1", "text_encoder_2"}] + [{"unet", "text_encoder_2"}] * 5


@pytest.mark.parametrize("stops", [(1,), (2,), (3,), (4,), (2, 3), (1, 2, 3, 5)])
def test_an_interruption_changes_nothing(configured: Callable[..., Config], stops: tuple[int, ...]) -> None:
    """Before, at and after the steps at which a part starts and stops."""
    straight = configured("straight", STRETCHES, ema=AVERAGES)
    interrupted = configured("interrupted", STRETCHES, ema=AVERAGES)
    watched_run(straight)
    done = 0
    for stop in stops:
        watched_run(interrupted, stop_after=stop - done)
        assert list_checkpoints(interrupted.run.dir)[-1].name == f"step-{stop:08d}"
        done = stop
    watched_run(interrupted)
    assert_same_checkpoints(checkpoint_dir(straight.run.dir, 8), checkpoint_dir(interrupted.run.dir, 8))


def test_what_rests_leaves_backward_and_optimizer(configured: Callable[..., Config]) -> None:
    config = configured("run", STRETCHES)
    watched_run(config, stop_after=1)
    parts = build_run(config, model_of(config), ALONE).parts
    resting = set(parts.strategy.resting)
    assert {name.split(".")[0] for name in resting} == {"text_encoder_2"}
    of_optimizer = {name for group in parts.optimizer.param_groups for name in group["param_names"]}
    assert of_optimizer == parts.strategy.parameters.keys() and not of_optimizer & resting
    asking = {name for name, p in parts.denoiser.model.named_parameters() if p.requires_grad}
    assert asking == of_optimizer
    assert {group["name"] for group in parts.optimizer.param_groups} == {"unet", "text_encoder_1"}


def test_a_longer_run_leaves_what_has_stopped_at_rest(configured: Callable[..., Config]) -> None:
    """A share of the run is another step then; what has been stopped stays so, what has not stops later."""
    parts = {"text_encoder_1": {"train": True, "stop_at": 0.25}, "text_encoder_2": {"train": True, "stop_at": 0.5}}
    keep = {"keep": 9}
    config, longer = (configured("run", parts, steps=steps, checkpoint=keep) for steps in (8, 16))
    watched_run(config, stop_after=3)
    watched_run(longer, stop_after=6)
    assert moments(longer, 9) == {"unet"}
    assert same(stored(longer, 9, "text_encoder"), stored(longer, 3, "text_encoder"))
    assert not same(stored(longer, 8, "text_encoder_2"), stored(longer, 3, "text_encoder_2"))
    state: Any = read_state(checkpoint_dir(longer.run.dir, 9))["part_times"]
    assert state["text_encoder_1"] == {"start": 0, "stop": 2, "asked": [None, 0.25]}
    assert state["text_encoder_2"] == {"start": 0, "stop": 8, "asked": [None, 0.5]}


def test_times_are_steps_of_the_run(configured: Callable[..., Config]) -> None:
    config = configured("run", STRETCHES)
    times = part_times(config, 100)
    assert times["text_encoder_1"] == PartTimes(0, 3, (None, 3))
    assert times["text_encoder_2"] == PartTimes(25, None, (0.25, None))
    assert [sorted(resting_parts(times, step)) for step in (0, 2, 3, 24, 25)] == [
        ["text_encoder_2"],
        ["text_encoder_2"],
        ["text_encoder_1", "text_encoder_2"],
        ["text_encoder_1", "text_encoder_2"],
        ["text_encoder_1"],
    ]
    assert part_times(configured("run", WHOLE), 100) == {}


@pytest.mark.parametrize(
    ("trainable", "line"),
    [
        (
            {"unet": {"stop_at": 3}, "text_encoder_1": {"train": True, "start_at": 5}},
            "trainable: nothing trains after step 3; let a part start earlier or stop later",
        ),
        (
            {"unet": {"start_at": 0.5, "stop_at": 3}, "text_encoder_1": {"train": True}},
            "trainable.unet.start_at = 0.5 with trainable.unet.stop_at = 3: of 8 steps, it would start after 4 and "
            "stop after 3; let it stop later",
        ),
        ({"unet": {"stop_at": 6}}, "trainable: nothing trains after step 6; let a part start earlier or stop later"),
    ],
)
def test_times_at_which_nothing_could_train_are_one_line(
    configured: Callable[..., Config], trainable: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError) as refused:
        build_run(configured("run", trainable), model_of(configured("run", trainable)), ALONE)
    assert str(refused.value) == line

"""Weights in the host's memory: the run that it is without, to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.small_set import write_small_set
from tests.train.real_run import model_of, run_config, watched_run
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.rules import broken_rules
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.memory.run_plan import Setting, memory_plan
from trainer.model.recompute import repeated_blocks
from trainer.train.memory_inputs import make_setting, planned_run
from trainer.train.step import StepParts

pytestmark = pytest.mark.e2e

LEAST: dict[str, Any] = {"release_gradients": True, "offload_optimizer": True, "recompute": "all"}
ADAPTER: dict[str, Any] = {"kind": "dora", "rank": 4, "text_encoders": True}
TEXT = {"text_encoder_1": {"train": True}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("hosted") / "prepared", {Bucket(64, 64): 8})


@pytest.fixture
def configured(model_folder: Path, prepared: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(name: str, hosted: bool | str, **sections: dict[str, Any]) -> Config:
        usual = run_config(model_folder, prepared, tmp_path / name, steps=4)
        fields = json.loads(usual.model_dump_json(exclude_unset=True))
        memory = {**LEAST, "offload_weights": hosted, **sections.pop("memory", {})}
        precision = {"train": {"precision": "bf16_stochastic"}}
        for section, values in {**precision, **sections, "memory": memory}.items():
            fields[section] = fields.get(section, {}) | values
        return Config.model_validate(fields)

    return make


def files_of(config: Config) -> dict[str, bytes]:
    """All that a checkpoint holds of weights and state."""
    folder = checkpoint_dir(config.run.dir, 4)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("precision", "kind", "trainable"),
    [
        ("fp32", "adamw", TEXT),
        ("bf16_kahan", "adamw", {"unet": {"freeze": ["attn1", "mid_block"]}}),
        ("bf16_stochastic", "schedule_free_adamw", {}),
        ("bf16_stochastic", "adamw_8bit", TEXT | {"unet": {"only": ["up_blocks"]}}),
        ("bf16", "adamw", ADAPTER),
    ],
)
def test_it_is_the_same_run_also_where_it_changes_on_the_way(
    configured: Callable[..., Config], precision: str, kind: str, trainable: dict[str, Any]
) -> None:
    """With frozen blocks and weights, clipping and validation; interrupted; begun with it and ended without."""
    sections: dict[str, Any] = {
        "train": {"precision": precision, "max_grad_norm": 0.01, "adaptive_clip": 0.5},
        "optimizer": {"kind": kind},
        **({"adapter": trainable} if trainable is ADAPTER else {"trainable": trainable}),
        "data": {"validation_fraction": 0.25},
        "validation": {"every_steps": 1, "timesteps": [500]},
    }
    expected = configured("usual", False, **sections)
    losses = [step.loss for step in watched_run(expected).results]
    ways = (("hosted", True, True), ("into", False, True), ("out", True, False))
    for name, first, then in ways[: 3 if precision == "fp32" else 1]:
        before = watched_run(configured(name, first, **sections), stop_after=2).results
        ended = configured(name, then, **sections)
        assert [step.loss for step in before + watched_run(ended).results] == losses
        found, wanted = files_of(ended), files_of(expected)
        assert found.keys() == wanted.keys()
        assert [file for file in found if found[file] != wanted[file]] == [], name


def check_places(step: int, parts: StepParts) -> None:
    """Before each step, all weights of the repeated blocks are in the host's memory; two slots serve them."""
    weights = parts.hosted_weights
    assert weights is not None
    blocks = repeated_blocks(parts.denoiser.model)
    of_blocks = {p for block in blocks.values() for p in block.parameters()}
    assert weights.parameters == of_blocks
    num_bytes = sum(p.nbytes for p in of_blocks)
    assert num_bytes <= weights.host_bytes < 1.05 * num_bytes
    assert step == 0 or 0 < weights.device_bytes < 0.7 * num_bytes
    homes = [home.host.memory for home in weights._homes.values()]
    places = {memory.untyped_storage().data_ptr() for memory in homes}
    assert all(p.untyped_storage().data_ptr() in places for p in of_blocks)


def test_what_lies_where(configured: Callable[..., Config]) -> None:
    """And where a block computes: never in the host's memory."""
    config, seen = configured("run", True), set[bool]()

    def look(step: int, parts: StepParts) -> None:
        check_places(step, parts)
        weights = parts.hosted_weights
        assert weights is not None

        def note(module: torch.nn.Module, _: object) -> None:
            slots = {slot.memory.untyped_storage().data_ptr() for slot in weights._slots}
            parameter = next(module.parameters(recurse=False))
            seen.add(parameter.untyped_storage().data_ptr() in slots)

        if step == 1:
            for block in repeated_blocks(parts.denoiser.model).values():
                for module in block.modules():
                    if next(module.parameters(recurse=False), None) is not None:
                        module.register_forward_pre_hook(note)

    watched_run(config, before_parts=look)
    assert seen == {True}


def test_a_budget_that_nothing_else_fits(configured: Callable[..., Config]) -> None:
    """Chosen by itself, and tried out before the first step."""

    def needed(hosted: bool) -> int:
        config = configured("plan", hosted, memory={"budget": "4GiB", "offload_activations": True})
        chosen = memory_plan(planned_run(config, model_of(config)), cpu_setting(config)).chosen
        assert chosen and chosen.hosts_weights == hosted
        return chosen.needed

    between = f"{(needed(False) + needed(True)) / 2 / 2**20:.3f}MiB"
    usual = configured("usual", False)
    automatic = {"budget": between, "recompute": "auto", "offload_optimizer": "auto"}
    ours = configured("ours", "auto", memory=automatic)
    watched_run(usual)
    watched_run(ours, before_parts=check_places)
    assert files_of(usual) == files_of(ours)


def cpu_setting(config: Config) -> Setting:
    return make_setting(config, "cpu", None, 1, 1, [Bucket(64, 64)], 1)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"memory": {"release_gradients": False, "offload_optimizer": "auto"}}, "needs memory.release_gradients: true"),
        ({"memory": {"offload_optimizer": False}}, "must be auto or true"),
        ({"memory": {"recompute": "none"}}, "must be auto or all"),
        ({"train": {"compile": "blocks"}}, "must be off"),
        ({"train": {"precision": "bf16"}}, "must be bf16_stochastic, bf16_kahan or fp32"),
        ({"ema": {"averages": [{"kind": "plain"}]}}, "must be empty"),
        ({"train": {"gradient_accumulation_steps": 2}}, "gradients are added up over the passes"),
        ({"launch": {"workers": 2}}, "several workers exchange gradients"),
    ],
)
def test_refused(configured: Callable[..., Config], sections: dict[str, Any], said: str) -> None:
    problems = broken_rules(configured("run", True, **sections))
    assert any(said in problem.text for problem in problems), [problem.text for problem in problems]

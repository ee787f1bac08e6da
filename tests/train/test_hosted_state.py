"""The optimizer's state in the host's memory: the run that it is without, to the bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.small_set import write_small_set
from tests.train.real_run import model_of, run_config, watched_run
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.checkpoint.write import OPTIMIZER
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.memory.run_plan import Setting, memory_plan
from trainer.optim.hosted.hosted_state import ALIGNMENT
from trainer.train.memory_inputs import make_setting, planned_run
from trainer.train.step import StepParts

pytestmark = pytest.mark.e2e

TEXT = {"text_encoder_1": {"train": True}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("hosted") / "prepared", {Bucket(64, 64): 8})


@pytest.fixture
def configured(model_folder: Path, prepared: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(name: str, hosted: bool | str, steps: int = 4, **sections: dict[str, Any]) -> Config:
        usual = run_config(model_folder, prepared, tmp_path / name, steps=steps)
        fields = json.loads(usual.model_dump_json(exclude_unset=True))
        memory = {"release_gradients": True, "offload_optimizer": hosted, **sections.pop("memory", {})}
        for section, values in {**sections, "memory": memory}.items():
            fields[section] = fields.get(section, {}) | values
        return Config.model_validate(fields)

    return make


def files_of(config: Config, step: int = 4) -> dict[str, bytes]:
    """All that a checkpoint holds of weights and state."""
    folder = checkpoint_dir(config.run.dir, step)
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("precision", "kind"),
    [("fp32", "adamw"), ("bf16_kahan", "adamw"), ("bf16_kahan", "schedule_free_adamw"), ("fp32", "muon")],
)
def test_it_is_the_same_run_also_where_it_changes_on_the_way(
    configured: Callable[..., Config], precision: str, kind: str
) -> None:
    """With a text encoder, clipping and an average; interrupted; begun with it and ended without, and the other way."""
    sections: dict[str, Any] = {
        "train": {"precision": precision, "max_grad_norm": 0.01},
        "optimizer": {"kind": kind},
        "trainable": TEXT,
    }
    if kind != "schedule_free_adamw":
        sections["ema"] = {"averages": [{"kind": "plain"}]}
    expected = configured("usual", False, **sections)
    watched_run(expected)
    for name, first, then in (("hosted", True, True), ("into", False, True), ("out", True, False)):
        watched_run(configured(name, first, **sections), stop_after=2)
        ended = configured(name, then, **sections)
        watched_run(ended)
        found, wanted = files_of(ended), files_of(expected)
        assert found.keys() == wanted.keys() and OPTIMIZER in found
        assert [file for file in found if found[file] != wanted[file]] == [], name


def check_home(step: int, parts: StepParts) -> None:
    """Before each step but the first, all state is in the host's memory."""
    assert parts.release and parts.release.hosted
    tensors = [value for state in parts.optimizer.state.values() for value in state.values() if value.ndim]
    num_bytes, in_host = sum(tensor.nbytes for tensor in tensors), parts.release.hosted.host_bytes
    assert (num_bytes > 0) == (step > 0)
    assert step == 0 or num_bytes <= in_host <= num_bytes + ALIGNMENT * len(tensors)
    assert step < 2 or 0 < parts.release.hosted.device_bytes < num_bytes


@pytest.mark.parametrize("kind", ["adamw_8bit", "adafactor"])
def test_what_lies_where(configured: Callable[..., Config], kind: str) -> None:
    sections: dict[str, Any] = {"train": {"precision": "bf16_stochastic"}, "optimizer": {"kind": kind}}
    usual, hosted = (configured(f"{on}", on, 2, **sections) for on in (False, True))
    expected, found = watched_run(usual), watched_run(hosted, before_parts=check_home)
    assert [step.loss for step in expected.results] == [step.loss for step in found.results]
    assert files_of(usual, 2) == files_of(hosted, 2)


def test_a_budget_that_nothing_else_fits(configured: Callable[..., Config]) -> None:
    """Chosen by itself, and tried out before the first step."""
    sections: dict[str, Any] = {"train": {"precision": "bf16_kahan"}}

    def needed(hosted: bool) -> int:
        least = {"budget": "4GiB", "recompute": "all", "offload_activations": True}
        config = configured("plan", hosted, **sections, memory=least)
        chosen = memory_plan(planned_run(config, model_of(config)), cpu_setting(config)).chosen
        assert chosen
        return chosen.needed

    between = f"{(needed(False) + needed(True)) / 2 / 2**20:.3f}MiB"
    usual = configured("usual", False, **sections)
    ours = configured("ours", "auto", **sections, memory={"budget": between})
    watched_run(usual)
    watched_run(ours, before_parts=check_home)
    assert files_of(usual) == files_of(ours)


def cpu_setting(config: Config) -> Setting:
    return make_setting(config, "cpu", None, 1, 1, [Bucket(64, 64)], 1)

"""Every kind in a real run: the loss falls, and a run that was stopped ends with the bits of one that was not."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.data.small_set import write_small_set
from tests.train.real_run import run_config, watched_run
from trainer.checkpoint.manifest import MANIFEST
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.errors import UserError
from trainer.optim.kinds.rule_table import RULES
from trainer.train.saved.averages import scored_weights
from trainer.train.step import StepParts

pytestmark = pytest.mark.e2e

NUMBERS = {"prodigy": {"lr": 1.0, "d0": 1e-4}, "dadapt_adam": {"lr": 1.0, "d0": 1e-4, "growth_rate": 1.1}}
LR = {"adafactor": 3e-2, "lion": 3e-4, "lion_8bit": 3e-4}
RUNS = [
    *((kind, "fp32") for kind in RULES),
    *(("lion_8bit", "bf16_kahan"), ("prodigy", "bf16_kahan"), ("schedule_free_adamw", "bf16_kahan")),
    *(("came", "bf16_stochastic"), ("muon", "bf16_stochastic"), ("schedule_free_adamw", "bf16_stochastic")),
]


@pytest.fixture
def configured(model_folder: Path, tmp_path: Path) -> Callable[..., Config]:
    """A run of a kind."""
    root = write_small_set(tmp_path / "prepared", {Bucket(64, 64): 8})

    def make(kind: str, steps: int, run: str, precision: str = "fp32", **more: Any) -> Config:
        config = run_config(model_folder, root, tmp_path / run, steps=steps).model_dump(mode="json", exclude_unset=True)
        config["train"]["precision"] = precision
        config["optimizer"] = {"kind": kind, "lr": LR.get(kind, 1e-3)} | NUMBERS.get(kind, {})
        return Config.model_validate(config | {"checkpoint": {"every": "never"}} | more)

    return make


def files(config: Config, step: int) -> dict[str, Any]:
    listed = json.loads((checkpoint_dir(config.run.dir, step) / MANIFEST).read_text())["files"]
    return {name: entry for name, entry in listed.items() if name.endswith(".safetensors")}


@pytest.mark.parametrize(("kind", "precision"), RUNS)
def test_a_stopped_run_goes_on_to_the_bit(configured: Callable[..., Config], kind: str, precision: str) -> None:
    straight, stopped = configured(kind, 6, "straight", precision), configured(kind, 6, "stopped", precision)
    watched_run(straight)
    watched_run(stopped, stop_after=3)
    went_on = watched_run(stopped)
    assert len(went_on.results) == 3
    assert files(straight, 6) == files(stopped, 6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
def test_the_loss_falls(configured: Callable[..., Config], kind: str) -> None:
    losses = [result.loss for result in watched_run(configured(kind, 120, "run")).results]
    assert mean(losses[-30:]) < 0.9 * mean(losses[:15]), (mean(losses[:15]), mean(losses[-30:]))


def test_another_kind_does_not_go_on(configured: Callable[..., Config]) -> None:
    watched_run(configured("adopt", 2, "run"))
    with pytest.raises(
        UserError, match=r"optimizer.kind = lion: .* as adopt keeps them; go on with optimizer.kind=adopt"
    ):
        watched_run(configured("lion", 4, "run"))


def test_schedule_free_publishes_its_average(configured: Callable[..., Config]) -> None:
    """The checkpoint's weights are the average, in fp32."""
    kind = "schedule_free_adamw"
    for precision in ("fp32", "bf16_stochastic"):
        config = configured(kind, 6, f"run-{precision}", precision)
        watched_run(config)
        folder = checkpoint_dir(config.run.dir, 6)
        state = load_file(folder / "training_state" / "optimizer.safetensors")
        weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        for name, stored in weights.items():
            trained, z = (state[f"unet.{name}.{kind}-{key}"] for key in ("trained", "z"))
            assert stored.dtype == torch.float32
            assert torch.equal(stored, trained.float().lerp(z, 1 - 1 / 0.9))
        assert any(not torch.equal(weights[name], state[f"unet.{name}.{kind}-trained"].float()) for name in weights)


def test_schedule_free_scores_its_average(configured: Callable[..., Config]) -> None:
    """Validation looks at the weights that are published, and changes no bit of those that train."""
    config = configured("schedule_free_adamw", 4, "run")
    seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def look(step: int, parts: StepParts) -> None:
        named = parts.strategy.parameters
        before = {name: parameter.detach().clone() for name, parameter in named.items()}
        with scored_weights(config.ema, parts)["live"]():
            seen.append((before, {name: parameter.detach().clone() for name, parameter in named.items()}))
        assert all(torch.equal(parameter, before[name]) for name, parameter in named.items())

    watched_run(config, before_parts=look)
    assert all(torch.equal(seen[0][0][name], scored) for name, scored in seen[0][1].items())
    assert any(not torch.equal(seen[3][0][name], scored) for name, scored in seen[3][1].items())
    straight = configured("schedule_free_adamw", 4, "straight")
    watched_run(straight)
    assert files(config, 4) == files(straight, 4)
    watched_run(short := configured("schedule_free_adamw", 3, "short"))
    published = load_file(checkpoint_dir(short.run.dir, 3) / "unet" / "diffusion_pytorch_model.safetensors")
    for name, scored in seen[3][1].items():
        torch.testing.assert_close(scored, published[name.removeprefix("unet.")], rtol=1e-6, atol=1e-7)

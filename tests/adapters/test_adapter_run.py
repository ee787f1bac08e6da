"""Real runs with an adapter: what trains, what checkpoints hold, and that an interruption changes no bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.adapters.adapter_config_of import KINDS, adapted
from tests.data.small_set import write_small_set
from tests.train.real_run import ALONE, model_of, watched_run
from tests.train.test_averages import assert_same_checkpoints
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.data.buckets import Bucket
from trainer.data.store.snapshot import PreparedSet
from trainer.errors import UserError
from trainer.train.build import load_denoiser
from trainer.train.step import StepParts

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("adapters") / "prepared", {Bucket(64, 64): 8})


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        *((kind, "fp32") for kind in KINDS),
        ("lora", "bf16_stochastic"),
        ("locon", "bf16_kahan"),
        ("loha", "bf16_stochastic"),
        ("lokr", "bf16_kahan"),
    ],
)
def test_only_the_adapter_trains_and_an_interruption_changes_no_bit(
    model_folder: Path, prepared: Path, tmp_path: Path, kind: str, precision: str
) -> None:
    seen: list[StepParts] = []
    ema = {"averages": [{"name": "ema", "decay": 0.9}]}
    settings: dict[str, Any] = KINDS[kind] | {"text_encoders": kind in ("lora", "lokr")}
    settings |= {"dropout": 0.2} if kind in ("lora", "dora") else {}
    sections: dict[str, Any] = {"ema": ema, "train": {"precision": precision}}
    straight = adapted(model_folder, prepared, tmp_path / "straight", settings, **sections)
    interrupted = adapted(model_folder, prepared, tmp_path / "interrupted", settings, **sections)
    losses = [result.loss for result in watched_run(straight, before_parts=lambda _, parts: seen.append(parts)).results]
    watched_run(interrupted, stop_after=3)
    watched_run(interrupted)
    assert_same_checkpoints(checkpoint_dir(straight.run.dir, 6), checkpoint_dir(interrupted.run.dir, 6))
    trained, model = seen[-1].strategy.parameters, seen[-1].denoiser.model
    base = {name: p for name, p in model.named_parameters() if name not in trained}
    assert trained and all(".default" in name for name in trained) and not any(p.requires_grad for p in base.values())
    held = torch.float32 if precision == "fp32" else torch.bfloat16
    original = load_file(model_folder / "unet" / "diffusion_pytorch_model.safetensors")
    for name, parameter in base.items():
        if name.startswith("unet."):
            weight = original[name.removeprefix("unet.").replace(".base_layer", "")]
            assert torch.equal(parameter, weight.to(held)), name
    files = {path.name for path in (checkpoint_dir(straight.run.dir, 6)).iterdir()}
    assert files == {"adapter", "adapter_ema", "training_state", "manifest.json"}
    stored = load_file(checkpoint_dir(straight.run.dir, 6) / "adapter" / "adapter_model.safetensors")
    assert len(stored) == len(trained) and all(tensor.dtype == held for tensor in stored.values())
    changed = [name for name, tensor in stored.items() if tensor.abs().max() > 0]
    assert len(changed) == len(stored)
    assert losses[0] > 0


def test_the_start_changes_nothing_and_hangs_on_seed_and_name_alone(
    model_folder: Path, prepared: Path, tmp_path: Path
) -> None:
    plain = adapted(model_folder, prepared, tmp_path / "plain", {})
    first = watched_run(plain, stop_after=1).results[0].loss
    for kind, settings in KINDS.items():
        config = adapted(model_folder, prepared, tmp_path / kind, settings)
        assert watched_run(config, stop_after=1).results[0].loss == pytest.approx(first, rel=1e-6), kind


def test_bf16_holds_the_base_in_bf16_and_starts_as_the_base(model_folder: Path, prepared: Path, tmp_path: Path) -> None:
    seen: list[StepParts] = []
    config = adapted(model_folder, prepared, tmp_path / "run", KINDS["dora"], train={"precision": "bf16"})
    watched_run(config, before_parts=lambda _, parts: seen.append(parts))
    model = seen[-1].denoiser.model
    dtypes = {p.dtype for name, p in model.named_parameters() if name not in seen[-1].strategy.parameters}
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in seen[-1].strategy.parameters.values()} == {torch.float32}


def test_other_settings_do_not_go_on(model_folder: Path, prepared: Path, tmp_path: Path) -> None:
    watched_run(adapted(model_folder, prepared, tmp_path / "run", KINDS["lora"]), stop_after=2)
    with pytest.raises(UserError, match=r"^adapter.rank = 8: .* was trained with 4; give that"):
        watched_run(adapted(model_folder, prepared, tmp_path / "run", KINDS["lora"] | {"rank": 8}))


def test_a_checkpoint_is_judged_as_it_trained(model_folder: Path, prepared: Path, tmp_path: Path) -> None:
    seen: list[StepParts] = []
    config = adapted(model_folder, prepared, tmp_path / "run", KINDS["lora"])
    watched_run(config, before_parts=lambda _, parts: seen.append(parts))
    place = checkpoint_dir(config.run.dir, 6)
    denoiser = load_denoiser(config, model_of(config), place, "live", PreparedSet.open(prepared), ALONE.device)
    ours = dict(seen[-1].denoiser.model.named_parameters())
    for name, parameter in denoiser.model.named_parameters():
        assert torch.equal(parameter, ours[name]), name

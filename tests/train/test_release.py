"""Updates within the backward pass: the same steps as after it, clipped block by block."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.data.small_set import write_small_set
from tests.train.real_run import ALONE, model_of, run_config, watched_run
from tests.train.test_step import denoiser, make_batch, make_parts  # noqa: F401 - a fixture
from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.errors import UserError
from trainer.model.denoiser import Denoiser
from trainer.model.recompute import gathered_units, release_blocks
from trainer.train.build import build_run
from trainer.train.gradient_blocks import gradient_blocks
from trainer.train.release import GradientRelease
from trainer.train.step import StepParts, train_step

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_set(tmp_path_factory.mktemp("release") / "prepared", {Bucket(64, 64): 8})


@pytest.fixture
def configured(model_folder: Path, prepared: Path, tmp_path: Path) -> Callable[..., Config]:
    def make(name: str, *, release: bool, **sections: dict[str, Any]) -> Config:
        fields = json.loads(
            run_config(model_folder, prepared, tmp_path / name, steps=4).model_dump_json(exclude_unset=True)
        )
        for section, values in {**sections, "memory": {"release_gradients": release}}.items():
            fields[section] = fields.get(section, {}) | values
        return Config.model_validate(fields)

    return make


@pytest.mark.parametrize(
    ("precision", "kind", "clip"),
    [("fp32", "adamw", 0.0), ("bf16_stochastic", "adamw_8bit", 0.0), ("bf16_kahan", "adamw", 0.01)],
)
def test_without_clipping_by_norm_it_is_the_same_run(
    configured: Callable[..., Config], precision: str, kind: str, clip: float
) -> None:
    """To the bit, with both text encoders, norms by block, an average, and after an interruption."""
    sections: dict[str, Any] = {
        "train": {"precision": precision, "max_grad_norm": 0, "adaptive_clip": clip},
        "optimizer": {"kind": kind},
        "trainable": {"text_encoder_1": {"train": True}, "unet": {"lr_scale": {"attn2": 0.5}}},
        "log": {"block_norms": True},
        "ema": {"averages": [{"kind": "plain"}]},
    }
    usual, released = (configured(f"{on}", release=on, **sections) for on in (False, True))
    expected = watched_run(usual)
    found = watched_run(released, stop_after=2).results + watched_run(released).results
    for one, other in zip(expected.results, found, strict=True):
        assert one.loss == other.loss
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-6)
        assert dict(one.block_norms) == pytest.approx(dict(other.block_norms), rel=1e-6)
    files = [checkpoint_dir(config.run.dir, 4) for config in (usual, released)]
    if precision == "fp32":  # the record has the norms, which are added up in another order
        files_of = [sorted(folder.rglob("*.safetensors")) for folder in files]
        assert len(files_of[0]) == len(files_of[1]) == 5
    for name in ("unet", "unet_ema", "text_encoder", "text_encoder_ema"):
        one, other = (next((folder / name).glob("*.safetensors")).read_bytes() for folder in files)
        assert one == other, name


def released(parts: StepParts, max_norm: float) -> StepParts:
    blocks = release_blocks(parts.strategy.parameters, gathered_units(parts.denoiser.model))
    return replace(parts, release=GradientRelease(parts.strategy.parameters, blocks, parts.optimizer, max_norm))


@pytest.mark.parametrize("weights", [[1.0] * 6, [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]])
def test_each_block_is_clipped_by_its_own_norm(denoiser: Denoiser, weights: list[float]) -> None:  # noqa: F811
    """Against gradients that are clipped so after the backward pass, also where images could not be read."""
    limit = 0.02
    plain = make_parts(denoiser)
    blocks = release_blocks(plain.strategy.parameters, gathered_units(plain.denoiser.model))
    factor, clipped = 6 / sum(weights), set[str]()
    start = {name: parameter.detach().clone() for name, parameter in plain.strategy.parameters.items()}

    def by_hand(loss_scale: float) -> None:
        members: dict[str, list[nn.Parameter]] = {}
        for name, parameter in plain.strategy.parameters.items():
            members.setdefault(blocks[name], []).append(parameter)
        for block, parameters in members.items():
            norms = torch.stack([torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None])
            norm = factor * float(torch.linalg.vector_norm(norms))
            if norm > limit:
                clipped.add(block)
                for parameter in parameters:
                    assert parameter.grad is not None
                    parameter.grad.mul_(limit / (norm + 1e-6))

    plain, ours = replace(plain, before_norm=by_hand), released(make_parts(denoiser), limit)
    for step in range(3):
        batch = make_batch(range(6 * step, 6 * step + 6), weights=weights)
        for parts in (plain, ours):
            train_step(parts, [batch], 1, 6.0, 1.0, False)
    assert 3 < len(clipped) < len({*blocks.values()})
    for name, parameter in ours.strategy.parameters.items():
        expected = plain.strategy.parameters[name]  # norms are added up in another order
        assert (parameter - expected).norm() <= 1e-3 * (expected - start[name]).norm(), name


def test_gradients_do_not_exist_together(denoiser: Denoiser) -> None:  # noqa: F811
    parts = released(make_parts(denoiser), 1.0)
    assert parts.release is not None
    held, most = parts.release._held, 0  # what waits for the rest of its block

    def look(parameter: torch.Tensor) -> None:
        nonlocal most
        assert parts.release is not None
        waiting = sum(t.numel() for block in parts.release._held.values() for t in block.values())
        most = max(most, waiting + sum(p.numel() for p in parts.strategy.parameters.values() if p.grad is not None))

    for parameter in parts.strategy.parameters.values():
        parameter.register_post_accumulate_grad_hook(look)
    train_step(parts, [make_batch(range(4))], 1, 4.0, 1.0, False)
    assert not held and all(p.grad is None for p in parts.strategy.parameters.values())
    assert 0 < most < 0.35 * sum(p.numel() for p in parts.strategy.parameters.values())


def test_what_cannot_be_right_changes_nothing(denoiser: Denoiser) -> None:  # noqa: F811
    parts = released(make_parts(denoiser), 1.0)
    parts = replace(parts, blocks=gradient_blocks(parts.strategy, ALONE.device))
    start = {name: parameter.detach().clone() for name, parameter in parts.strategy.parameters.items()}
    bad = replace(parts, weigh=lambda batch: batch.weights * math.nan)
    result = train_step(bad, [make_batch(range(4))], 1, 4.0, 1.0, False)
    assert result.verdict.reason == "loss not finite" and not result.took_effect
    empty = train_step(parts, [make_batch(range(4), weights=[0.0] * 4)], 1, 4.0, 1.0, False)
    assert not empty.took_effect and math.isnan(empty.loss)
    assert all(torch.equal(parameter, start[name]) for name, parameter in parts.strategy.parameters.items())
    poisoned = parts.strategy.parameters["unet.conv_in.weight"]
    poisoned.register_hook(lambda gradient: gradient * math.inf)
    result = train_step(parts, [make_batch(range(4))], 1, 4.0, 1.0, False)
    assert result.verdict.reason == "gradients not finite" and result.verdict.is_fault
    assert torch.equal(poisoned, start["unet.conv_in.weight"])
    assert all(parameter.isfinite().all() for parameter in parts.strategy.parameters.values())
    assert not torch.equal(parts.strategy.parameters["unet.conv_out.weight"], start["unet.conv_out.weight"])


def test_it_is_for_one_pass(configured: Callable[..., Config]) -> None:
    config = configured("run", release=True, train={"global_batch_size": 8})
    with pytest.raises(UserError) as refused:
        build_run(config, model_of(config), ALONE)
    line = "memory.release_gradients = true: is for one worker with one pass a step; this run has 1 and 2"
    assert str(refused.value) == line

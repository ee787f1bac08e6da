"""Training by masks: cuts of a step, resumed runs, both modes, validation, and what is refused before a run begins."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.photographs import write_crops
from tests.train.real_run import ALONE, model_of, run_config, watched_run
from tests.train.test_step import assert_same_step, denoiser, make_batch, make_parts  # noqa: F401 - a fixture
from trainer.config.schema import Config
from trainer.config.sections.objective_config import ObjectiveConfig
from trainer.data.loader import Batch
from trainer.data.prepare.commit import commit
from trainer.data.prepare.stages import is_current, plan_prepare
from trainer.data.store.snapshot import PreparedSet
from trainer.diffusion.masking import area_mean, masked_mean
from trainer.errors import UserError
from trainer.model.denoiser import Denoiser
from trainer.train.placement import require_masks
from trainer.train.run_objective import describe_objective
from trainer.train.step import train_step
from trainer.train.workers.eval_worker import evaluate_weights
from trainer.train.workers.prepare_worker import encode_share, note_references, prepare_settings

BUCKETS = {"resolution": 128, "min_px": 64, "max_px": 256, "step_px": 64}
AUGMENTED = {"mode": "images", "augment": {"flip_probability": 0.5, "random_crop": True}}
Configured = Callable[..., Config]


def _masked(rows: range, weights: list[float] | None = None) -> Batch:
    """Row i has a mask of its own; every fifth is empty."""
    masks = [
        torch.randint(256, (8, 8), generator=torch.Generator().manual_seed(row), dtype=torch.uint8) * (row % 5 > 0)
        for row in rows
    ]
    return replace(make_batch(rows, weights), masks=torch.stack(masks))


@pytest.mark.parametrize("mean", [masked_mean(0.1), area_mean()])
def test_a_step_does_not_depend_on_how_it_is_cut(denoiser: Denoiser, mean: object) -> None:  # noqa: F811
    masked = replace(denoiser, objective=replace(denoiser.objective, mean=mean))
    whole, halves = [_masked(range(4))], [_masked(range(2)), _masked(range(2, 4))]
    assert_same_step(masked, whole, 4.0, halves, 4.0)
    assert_same_step(masked, [_masked(range(3))], 3.0, [_masked(range(4), [1.0, 1.0, 1.0, 0.0])], 3.0)


def test_images_that_are_masked_out_change_nothing(denoiser: Denoiser) -> None:  # noqa: F811
    """A step on empty masks has a gradient of exactly 0; beside others, they only count as images."""
    masked = replace(denoiser, objective=replace(denoiser.objective, mean=area_mean()))
    empty = replace(make_batch(range(2)), masks=torch.zeros(2, 8, 8, dtype=torch.uint8))
    alone = train_step(make_parts(masked), [empty], 1, 2.0, 1.0, False)
    assert (alone.loss, alone.grad_norm, alone.num_images) == (0.0, 0.0, 2.0)
    full = replace(make_batch(range(2, 4)), masks=torch.full((2, 8, 8), 255, dtype=torch.uint8))
    both = train_step(make_parts(masked), [empty, full], 2, 4.0, 1.0, False)
    plain = train_step(make_parts(denoiser), [make_batch(range(2, 4))], 1, 2.0, 1.0, False)
    assert both.loss == pytest.approx(plain.loss / 2, rel=1e-6)
    assert both.grad_norm == pytest.approx(plain.grad_norm / 2, rel=1e-5)


@pytest.fixture(scope="module")
def configured(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Configured:
    """Makes configurations of one folder of photographs with masks, and the data sets that they name."""
    root = tmp_path_factory.mktemp("masked")
    write_crops(root / "photos", 20)
    for i, path in enumerate(sorted((root / "photos").glob("*.jpg"))):
        with Image.open(path) as image:
            width, height = image.size
        values = np.zeros((height, width), dtype=np.uint8)
        values[:, : width // 2] = 255
        if i % 4:
            Image.fromarray(values).save(path.with_name(f"{path.stem}-masklabel.png"))

    def make(
        run: str, data: dict | None = None, loss: dict | None = None, masks: str = "files", **train: int
    ) -> Config:
        data = data or {}
        prepared = root / f"{data.get('mode', 'latents')}-{masks}"
        sources = [{"path": str(root / "photos"), "masks": masks}]
        settings = {"sources": sources, "buckets": BUCKETS, "validation_fraction": 0.2}
        config = run_config(model_folder, prepared, root / run, {**settings, **data}, **train)
        objective = ObjectiveConfig.model_validate({"loss": {"masked": True} if loss is None else loss})
        config = config.model_copy(update={"objective": objective})
        if not is_current(prepare_settings(config, model_of(config))):
            plan_prepare(prepare_settings(config, model_of(config)), show_progress=False)
            encode_share(config, model_of(config)) if config.data.mode == "latents" else note_references(config)
            commit(prepared)
        return config

    return make


@pytest.mark.e2e
@pytest.mark.parametrize("data", [{}, AUGMENTED], ids=["latents", "images"])
def test_a_masked_run_stops_and_goes_on(configured: Configured, data: dict) -> None:
    loss = {"masked": True, "unmasked_weight": 0.1, "unmasked_probability": 0.3}
    name = data.get("mode", "latents")
    straight = watched_run(configured(f"{name}-straight", data, loss, steps=8))
    stopped = configured(f"{name}-stopped", data, loss, steps=8)
    first = watched_run(stopped, stop_after=3)
    second = watched_run(stopped)
    assert [r.loss for r in first.results + second.results] == [r.loss for r in straight.results]
    plain = watched_run(configured(f"{name}-plain", data, {"masked": False}, steps=8))
    ratios = [ours.loss / theirs.loss for ours, theirs in zip(straight.results, plain.results, strict=True)]
    assert min(ratios) < 0.9 and 0.5 < sum(ratios) / 8 < 0.95  # a step of images without masks is as it was
    # The evaluation is masked as well: of half of most images.
    folder = stopped.run.dir / "eval"
    folder.mkdir()
    newest = sorted((stopped.run.dir / "checkpoints").iterdir())[-1]
    losses = []
    for config in (stopped, configured("judge", data, {"masked": False}, steps=8)):
        evaluate_weights(config, model_of(config), ALONE, newest, folder)
        losses.append(json.loads((folder / "validation.json").read_text())["loss"])
    assert 0.4 * losses[1] < losses[0] < 0.9 * losses[1]


def test_both_modes_give_the_same_masks(configured: Configured) -> None:
    sets = [PreparedSet.open(configured("x", data).data.prepared) for data in ({}, {"mode": "images"})]
    masks = []
    for prepared in sets:
        found = {}
        for bucket, count in enumerate(prepared.rows_per_bucket("train")):
            rows = prepared.read("train", bucket, np.arange(count), with_masks=True)
            assert rows.masks is not None and rows.ok.all()
            found |= dict(zip(rows.keys, rows.masks, strict=True))
        masks.append(found)
    assert masks[0].keys() == masks[1].keys() and len(masks[0]) > 10
    assert all(np.array_equal(mask, masks[1][key]) for key, mask in masks[0].items())


def test_masks_that_are_not_used_or_not_there_are_one_line(configured: Configured) -> None:
    config = configured("y", loss={"masked": False})
    said = "  masks: data.sources have some, which are not used; objective.loss.masked=true uses them"
    assert said in describe_objective(config, model_of(config))
    masked = configured("y")
    assert not [line for line in describe_objective(masked, model_of(masked)) if "not used" in line]
    without = configured("z", masks="none", loss={"masked": False})
    config = masked.model_copy(update={"data": without.data})
    with pytest.raises(UserError, match=r"masked = true: snapshot 000001.json of .*none, with which this epoch began"):
        require_masks(config, PreparedSet.open(without.data.prepared))

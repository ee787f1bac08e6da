"""Runs in which images count more or less: against AdamW by hand, and from the command to the checkpoint."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from tests.data.photographs import write_crops
from tests.data.small_set import write_small_set
from tests.test_end_to_end import losses, unet_hash
from tests.train.real_run import ALONE, model_of, run_config, watched_run
from tests.warm_processes import sdxl_train
from trainer.cli.main import main
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.data.buckets import Bucket
from trainer.data.captions import caption_record
from trainer.data.loader import BatchReader, Request
from trainer.data.prepare.stages import is_current
from trainer.data.sampler import Position, planned_steps, same_each_epoch
from trainer.model.text import load_tokenizers
from trainer.train.build import build_run
from trainer.train.step import batch_losses
from trainer.train.workers.prepare_worker import prepare_settings

TALL, SQUARE = Bucket(128, 64), Bucket(64, 64)


@pytest.mark.e2e
def test_a_run_trains_what_a_hand_weighted_loss_trains(tmp_path: Path, model_folder: Path) -> None:
    """Squares are a source of weight 0.25; every third image weighs 3 by itself, and `blurry` ones a half of that."""

    def record(i: int) -> bytes:
        return caption_record(f"photo {i}", "blurry, solo" if i % 2 else "solo", 3.0 if i % 3 == 0 else 1.0)

    root = write_small_set(tmp_path / "prepared", {SQUARE: 10, TALL: 6}, record=record)
    (tmp_path / "tags.json").write_text('{"blurry": 0.5}')
    sources = [{"path": str(tmp_path / "64x64"), "loss_weight": 0.25, "weight_extension": ".w"}, {"path": "128x64"}]
    config = run_config(model_folder, root, tmp_path / "run", {"sources": sources}, steps=4)
    weights = config.objective.loss_weights.model_copy(update={"tag_file": tmp_path / "tags.json"})
    objective = config.objective.model_copy(update={"loss_weights": weights})
    config = config.model_copy(update={"objective": objective})
    trained = watched_run(config)

    by_hand = build_run(
        config.model_copy(update={"run": config.run.model_copy(update={"dir": tmp_path})}), model_of(config), ALONE
    )
    parameters = by_hand.parts.strategy.parameters
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.01)
    reader = BatchReader(by_hand.prepared, "train", 5, load_tokenizers(model_of(config).tokenizers))
    steps = planned_steps(same_each_epoch(by_hand.prepared.rows_per_bucket("train")), 5, Position.start(2, 4))
    for result in trained.results:
        rows, _ = next(steps)
        batch = reader.read(Request(rows.epoch, rows.bucket, rows.ids, rows.weights))
        numbers = [int(key.partition("/")[2]) for key in batch.keys if key]
        factors = [
            (0.25 if batch.keys[0].startswith("64x64/") else 1.0)
            * (3.0 if i % 3 == 0 else 1.0)
            * (0.5 if i % 2 else 1.0)
            for i in numbers
        ]
        factors += [0.0] * (4 - len(factors))
        loss = (batch_losses(by_hand.parts, batch, 0, 4.0).losses * torch.tensor(factors)).sum() / len(numbers)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
        assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
        assert result.num_images == len(numbers)


@pytest.mark.e2e
def test_prior_preservation_from_the_command_to_the_checkpoint(
    tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prepared once; the weight of the regularization images changes without it. An interrupted run is the same."""
    write_crops(tmp_path / "subject", 6)
    write_crops(tmp_path / "regs", 6, seed=1)
    for path in (tmp_path / "subject").glob("*.txt"):
        path.write_text("1girl, solo" if path.stem.endswith(("0", "2")) else "1girl, hat")
    subject = {"path": str(tmp_path / "subject"), "caption_files_hold": "tags"}
    config = {
        "run": {"dir": str(tmp_path / "run"), "seed": 3},
        "launch": {"workers": 1, "threads_per_worker": 1},
        "model": {"path": str(model_folder)},
        "data": {
            "sources": [subject, {"path": str(tmp_path / "regs"), "prior": True}],
            "prepared": str(tmp_path / "prepared"),
            "buckets": {"resolution": 64, "min_px": 64, "max_px": 64, "step_px": 64},
            "workers": 1,
        },
        "objective": {"loss_weights": {"prior": 0.25, "tag_balance": {"power": 0.5}}},
        "train": {"steps": 6, "batch_size_per_gpu": 3, "precision": "fp32"},
        "optimizer": {"lr": 1e-3},
        "checkpoint": {"every_steps": 3},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    done = sdxl_train(path)
    assert "loss weights: regs 0.25 (prior); tags balanced by their counts with power 0.5" in done.stderr
    assert "tags: 3 different ones, 50.0% of 12 images an epoch have none" in done.stdout

    # From here on in this process, which reads by threads.
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000006")

    def read(run: str, *overrides: str) -> Config:
        return load_config(path, [f"run.dir={tmp_path / run}", "data.workers=0", *overrides])

    watched_run(read("again"))
    assert losses(tmp_path / "again") == losses(tmp_path / "run")
    assert unet_hash(tmp_path / "again", 6) == unet_hash(tmp_path / "run", 6)

    heavier = read("heavier", "objective.loss_weights.prior=0.5", "train.steps=4")
    assert is_current(prepare_settings(heavier, model_of(heavier)))
    assert watched_run(heavier).results[0].loss > losses(tmp_path / "run")[0]
    assert main(["data", "stats", str(path), "--out", str(tmp_path / "stats.png")]) == 0
    assert "loss weights: mean 0.625, median " in capsys.readouterr().out  # a half 0.25 each, a half 1 on average

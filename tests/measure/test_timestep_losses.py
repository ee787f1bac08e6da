"""Training loss by timestep: sums against a count by hand, and records of enough images."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.measure.test_telemetry import STEP
from trainer.measure.telemetry import MetricsWriter
from trainer.measure.timestep_losses import PARTS, TimestepLosses, sums_by_timestep


def test_sums_are_those_of_a_count_by_hand() -> None:
    """Of two micro-batches; the borders of a part, its last position and a row that could not be read among them."""
    positions = [0.0, 0.1249, 0.125, 0.5, 0.999999, 0.3, 0.3, 0.77]
    losses = [1.0, 2.0, 4.0, 8.0, 16.0, math.nan, 32.0, 64.0]
    weights = [1.0, 0.5, 1.0, 2.0, 1.0, 0.0, 1.0, 0.25]
    counts = [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    two = [torch.tensor(part, dtype=torch.float64) for part in (positions[:3], positions[3:])]
    found = sums_by_timestep(
        two, torch.tensor(losses, dtype=torch.float64), torch.tensor(weights), torch.tensor(counts)
    )
    by_part, images = [0.0] * PARTS, [0.0] * PARTS
    for position, loss, weight, count in zip(positions, losses, weights, counts, strict=True):
        timestep = math.floor(1000 * position)
        for part in range(PARTS):
            if 125 * part <= timestep < 125 * (part + 1) and count:
                by_part[part] += weight * loss
                images[part] += 1
    assert found == [*by_part, *images]


def test_a_loss_that_is_not_finite_is_left_out_with_its_step() -> None:
    gathered = TimestepLosses()
    gathered.add([math.nan, *[1.0] * 7, *[100.0] * 8])
    gathered.add(())
    assert gathered.take() == {}
    gathered.add([50.0, *[25.0] * 6, 0.0, *[60.0] * 7, 0.0])
    record = gathered.take()
    assert record["loss_t0"] == pytest.approx(50 / 60) and record["images_t750"] == 60
    assert "loss_t875" not in record, "no image was there"
    assert gathered.take() == {}


def test_the_run_has_a_record_of_enough_images_at_a_step_that_is_logged(tmp_path: Path) -> None:
    """150 images a step, every second step logged: 400 are there after the third, and told at the fourth."""
    sums = [part * 150 / 8 for part in range(8)] + [150 / 8] * 8
    with MetricsWriter(tmp_path, None, tensorboard=False) as writer:
        for step in range(1, 9):
            writer.seen(sums)
            if step % 2 == 0:
                writer.step(replace(STEP, step=step))
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [record for record in found if record["kind"] == "train_by_timestep"]
    assert [record["step"] for record in found] == [4, 8]
    assert [found[0][f"loss_t{125 * part}"] for part in range(8)] == [*range(8)]
    assert sum(found[1][f"images_t{125 * part}"] for part in range(8)) == 600

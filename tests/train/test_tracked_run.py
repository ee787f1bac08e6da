"""A run of the loop with a tracker beside it."""

import csv
from pathlib import Path

import pytest

from tests.data.small_set import write_small_set
from tests.train.real_run import run_config, watched_run
from trainer.config.sections.log_config import LogConfig
from trainer.data.buckets import Bucket

pytestmark = pytest.mark.e2e


def test_a_run_with_trackers_takes_the_same_steps(tmp_path: Path, model_folder: Path) -> None:
    """Stopped after a step and gone on with; the tables are those of the records, the losses those without."""
    root = write_small_set(tmp_path / "prepared", {Bucket(64, 64): 6})
    plain = run_config(model_folder, root, tmp_path / "plain", steps=4)
    without = watched_run(plain)
    config = run_config(model_folder, root, tmp_path / "run", steps=4)
    config = config.model_copy(update={"log": LogConfig(trackers=["csv"], name="fox")})
    first = watched_run(config, stop_after=2)
    rest = watched_run(config)
    losses = [result.loss for result in (*first.results, *rest.results)]
    assert losses == [result.loss for result in without.results]
    with (tmp_path / "run/metrics.csv").open(newline="") as file:
        assert [float(row["loss"]) for row in csv.DictReader(file) if row["kind"] == "train"] == losses
    assert not (tmp_path / "run/tensorboard").exists()

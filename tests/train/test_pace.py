"""A real run of two workers, of which one takes longer for its forward passes."""

from pathlib import Path

import pytest

from tests.data.small_set import write_small_set
from tests.train.real_run import run_config
from trainer.cli.start_workers import start_workers
from trainer.config.schema import Config
from trainer.data.buckets import Bucket

pytestmark = pytest.mark.e2e


def test_a_worker_that_is_slow_is_named(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_small_set(tmp_path / "prepared", {Bucket(64, 64): 16})
    config = run_config(model_folder, root, tmp_path / "run").model_dump(mode="json")
    config |= {"launch": {"workers": 2, "threads_per_worker": 1}, "guard": {"spike_sigma": 0.0}}
    config["train"] |= {"steps": 70, "batch_size_per_gpu": 1}
    monkeypatch.setenv("FAULT", "slow@1:1-70:0.3")
    assert start_workers("train", Config.model_validate(config), tmp_path / "run", {}) == 0
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("worker 1 computes slowly: 3") == 1 and "worker 0 computes slowly" not in log
    assert "forward passes of a step, median/p99 in ms by worker: " in log

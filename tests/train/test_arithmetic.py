"""`train.batch_by_area`: which buckets take more, and a run whose steps do."""

import math
from collections import Counter
from pathlib import Path

import pytest

from tests.data.photographs import coffee
from tests.train.real_run import model_of, run_config, watched_run
from trainer.data.buckets import Bucket
from trainer.data.prepare.commit import commit
from trainer.data.prepare.stages import plan_prepare
from trainer.train.arithmetic import MOST_BATCHES, batch_factors
from trainer.train.workers.prepare_worker import encode_share, note_references, prepare_settings

BUCKETS = {"resolution": 128, "min_px": 64, "max_px": 256, "step_px": 64, "no_upscale": True}


def test_whole_batches_that_fit_in_the_area(tmp_path: Path) -> None:
    buckets = [Bucket(128, 128), Bucket(64, 256), Bucket(64, 192), Bucket(64, 128), Bucket(64, 64), Bucket(8, 8)]
    config = run_config(tmp_path, tmp_path, tmp_path, {"buckets": BUCKETS}, batch_by_area=True)
    assert batch_factors(config, buckets) == [1, 1, 1, 2, 4, MOST_BATCHES]
    assert batch_factors(run_config(tmp_path, tmp_path, tmp_path), buckets) == [1] * 6


@pytest.mark.e2e
@pytest.mark.parametrize("mode", ["latents", "images"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_with_larger_batches_of_small_images(tmp_path: Path, model_folder: Path, mode: str, workers: int) -> None:
    (tmp_path / "photos").mkdir()
    sizes = {(128, 128): 5, (64, 64): 13, (128, 64): 6}
    for width, height in sizes:
        for i in range(sizes[width, height]):
            coffee().crop((9 * i, 5 * i, 9 * i + width, 5 * i + height)).save(
                tmp_path / f"photos/{width}x{height}-{i}.png"
            )
    data = {"sources": [{"path": str(tmp_path / "photos")}], "buckets": BUCKETS, "mode": mode, "workers": workers}
    settings = {"steps": None, "epochs": 2, "batch_size_per_gpu": 2, "batch_by_area": True}
    config = run_config(model_folder, tmp_path / "prepared", tmp_path / "run", data, **settings)
    plan_prepare(prepare_settings(config, model_of(config)), show_progress=False)
    encode_share(config, model_of(config)) if mode == "latents" else note_references(config)
    commit(tmp_path / "prepared")
    first = watched_run(config, stop_after=4)
    second = watched_run(config.model_copy(update={"train": config.train.model_copy(update={"batch_by_area": False})}))
    larger = {(128, 128): 2, (64, 64): 8, (128, 64): 4}
    for step in first.keys:
        (size,) = {tuple(map(int, key.split("/")[1].split("-")[0].split("x"))) for key in step}
        assert len(step) <= larger[size]
    counts = Counter(key for step in first.keys + second.keys for key in step)
    assert len(counts) == 24 and set(counts.values()) == {2}
    assert all(len(step) <= 2 for step in second.keys)
    steps = sum(math.ceil(count / larger[size]) for size, count in sizes.items())
    assert steps == 3 + 2 + 2 and max(map(len, first.keys)) > 2

"""The loop on real data: an epoch stays with its snapshot, the next one takes the newest."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.data.small_set import write_small_set
from tests.train.real_run import Watched, run_config, watched_run
from trainer.data.buckets import Bucket
from trainer.data.catalog.settings import replace_file
from trainer.data.store.snapshot_file import Part, read_snapshot, snapshot_to_json

pytestmark = pytest.mark.e2e

SQUARE, WIDE, TALL = Bucket(64, 64), Bucket(64, 128), Bucket(128, 64)


def _append(root: Path) -> None:
    """More images of a bucket that is there, and of one that sorts between the old ones."""
    write_small_set(root, {SQUARE: 3, WIDE: 5}, keep=read_snapshot(root, "000001.json"))


def _epochs(steps: list[list[str]], first: int) -> list[Counter[str]]:
    return [Counter(key for step in part for key in step) for part in (steps[:first], steps[first:])]


OLD = Counter([*(f"64x64/{i}" for i in range(6)), *(f"128x64/{i}" for i in range(7))])
NEW = Counter([*(f"64x64-2/{i}" for i in range(3)), *(f"64x128-2/{i}" for i in range(5))])
STEPS_OF_FIRST = 2 + 2  # ceil(6 / 4) + ceil(7 / 4)
STEPS_OF_SECOND = 3 + 2 + 2  # 9, 5 and 7 images


@pytest.mark.parametrize("appended", ["while it runs", "while it is stopped", "while it is stopped between epochs"])
def test_an_epoch_stays_with_its_snapshot(tmp_path: Path, model_folder: Path, appended: str) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 6, TALL: 7})
    config = run_config(model_folder, root, tmp_path / "run", epochs=2)
    if appended == "while it runs":
        run = watched_run(config, before_step=lambda step: _append(root) if step == 2 else None)
        keys = run.keys
    else:
        stop_after = STEPS_OF_FIRST if "between" in appended else 2
        first = watched_run(config, stop_after=stop_after)
        assert len(first.keys) == stop_after
        _append(root)
        run = watched_run(config)
        keys = first.keys + run.keys
    assert _epochs(keys, STEPS_OF_FIRST) == [OLD, OLD + NEW]
    assert len(keys) == STEPS_OF_FIRST + STEPS_OF_SECOND
    _assert_ended(run)


def _assert_ended(run: Watched) -> None:
    assert run.state is not None and run.state.snapshot == "000002.json"
    assert run.state.position.epoch == 2 and run.state.position.starts_epoch
    assert run.state.images_seen == OLD.total() + (OLD + NEW).total()


def test_an_epoch_whose_snapshot_was_pruned_ends(
    tmp_path: Path, model_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_small_set(tmp_path / "prepared", {SQUARE: 6, TALL: 7})
    config = run_config(model_folder, root, tmp_path / "run", epochs=2)
    watched_run(config, stop_after=2)
    _append(root)
    (root / "snapshots" / "000001.json").unlink()
    run = watched_run(config)
    assert "snapshot 000001.json was pruned: epoch 1 ends here, 2 begins" in caplog.text
    assert Counter(key for step in run.keys for key in step) == OLD + NEW
    assert run.state is not None and run.state.position.epoch == 2


def test_weighted_sources_over_a_restart(tmp_path: Path, model_folder: Path) -> None:
    """Two epochs of half the images: each one once, whether the run is stopped within an epoch or not."""
    root = write_small_set(tmp_path / "prepared", {SQUARE: 6, TALL: 8})
    path = root / "snapshots" / "000001.json"
    snapshot = read_snapshot(root, path.name)
    shards = tuple(replace(s, parts=(Part("photos", s.rows, s.virtual_rows),)) for s in snapshot.shards)
    settings = snapshot.settings | {"data.sources": [{"name": "photos", "weight": 0.5}]}
    replace_file(path, snapshot_to_json(replace(snapshot, shards=shards, settings=settings)))
    straight = watched_run(run_config(model_folder, root, tmp_path / "straight", epochs=2))
    assert Counter(key for step in straight.keys for key in step) == Counter(
        [*(f"64x64/{i}" for i in range(6)), *(f"128x64/{i}" for i in range(8))]
    )
    config = run_config(model_folder, root, tmp_path / "run", epochs=2)
    first = watched_run(config, stop_after=1)
    assert first.keys + watched_run(config).keys == straight.keys

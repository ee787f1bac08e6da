"""The loop on real data: an epoch stays with its snapshot, the next one takes the newest."""

from collections import Counter
from pathlib import Path

import pytest

from tests.data.small_set import write_small_set
from tests.train.real_run import Watched, run_config, watched_run
from trainer.data.buckets import Bucket
from trainer.data.store.snapshot_file import read_snapshot

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

"""A prepare that is killed at any moment, and typed again: the same bytes as one that nothing happened to."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.photographs import settings_for, write_crops
from tests.data.prepare.prepare_worker import KINDS, begun
from tests.data.prepare.test_changes import edit_all, held, prepare


@pytest.mark.e2e
@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_twenty_moments(tmp_path: Path, kind: str) -> None:
    photos = tmp_path / "photos"
    write_crops(photos, 200)
    settings = settings_for(tmp_path / "prepared", photos, **KINDS[kind])
    prepare(settings)
    shutil.copytree(settings.prepared, tmp_path / "once")
    edit_all(photos)
    once = settings_for(tmp_path / "once", photos, **KINDS[kind])
    prepare(once, removed="drop")
    rng = np.random.default_rng()
    for _ in range(20):
        with begun(settings.prepared, photos, kind) as worker:
            time.sleep(float(rng.uniform(0.0, 0.6)))
            worker.kill()
    prepare(settings, removed="drop")
    assert held(settings.prepared) == held(once.prepared)
    for kind in ("edits", "snapshots", "shards"):
        mine, other = (
            {path.relative_to(root): path.read_bytes() for path in root.glob(f"{kind}/**/*") if path.is_file()}
            for root in (settings.prepared, once.prepared)
        )
        assert mine == other, kind

"""A prepare that is killed at any moment, and typed again: the same bytes as one that nothing happened to."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data.photographs import settings_for, write_crops
from tests.data.prepare.prepare_worker import KINDS
from tests.data.prepare.test_changes import edit_all, held, prepare

ROOT = Path(__file__).parents[3]


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
    script = str(Path(__file__).with_name("prepare_worker.py"))
    command = [sys.executable, script, str(settings.prepared), str(photos), kind]
    rng = np.random.default_rng()
    for _ in range(20):
        with subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True
        ) as worker:
            assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
            time.sleep(float(rng.uniform(0.0, 0.6)))
            worker.send_signal(signal.SIGKILL)
    prepare(settings, removed="drop")
    assert held(settings.prepared) == held(once.prepared)
    for kind in ("edits", "snapshots", "shards"):
        mine, other = (
            {path.relative_to(root): path.read_bytes() for path in root.glob(f"{kind}/**/*") if path.is_file()}
            for root in (settings.prepared, once.prepared)
        )
        assert mine == other, kind

"""Runs a whole prepare, or one worker of it, in a process that a test may kill: PREPARED FOLDER [KIND | RANK WORLD].

`PREPARED prune` prunes.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.photographs import pooled, settings_for
from tests.warm_processes import WarmProcess, run_script
from trainer.config.sections.data.filters_config import FiltersConfig
from trainer.data.buckets import BucketRules, OtherResolution
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.prune import Pruned, delete_unused, plan_prune
from trainer.data.prepare.stages import plan_prepare

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"validation_fraction": 0.2},
    "filtered": {
        "validation_fraction": 0.2,
        "filters": FiltersConfig(min_side_px=80, near_duplicates=2),
        "buckets": BucketRules(resolution=256, min_px=128, max_px=512, step_px=32),
        "also_at": (OtherResolution(128, 0.5),),
    },
}
"""What is prepared with."""


def prune(prepared: Path) -> Pruned:
    plan_prune(prepared)
    encode_shards(prepared, 0, 1, None)
    commit(prepared)
    return delete_unused(prepared)


def _slow(pixels: np.ndarray, draw_seeds: np.ndarray) -> np.ndarray:
    time.sleep(0.01)
    return pooled(pixels, draw_seeds)


@contextmanager
def begun(*arguments: object) -> Iterator[WarmProcess]:
    """This script in a process of its own, which has imported all and begins to work; it has ended behind this."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as said:
        with os.fdopen(writing, "wb") as output:
            worker = run_script(__file__, [*map(str, arguments)], os.environ, output)
        try:
            assert said.readline() == "ready\n"
            yield worker
        finally:
            worker.wait(600)


def main() -> None:
    prepared, folder = Path(sys.argv[1]), Path(sys.argv[2])
    print("ready", flush=True)
    if sys.argv[2] == "prune":
        prune(prepared)
        return
    if len(sys.argv) > 4:
        encode_shards(prepared, int(sys.argv[3]), int(sys.argv[4]), _slow, vae_batch_size=2)
        return
    kind = sys.argv[3] if len(sys.argv) > 3 else "plain"
    plan_prepare(settings_for(prepared, folder, **KINDS[kind]), show_progress=False, removed="drop")
    encode_shards(prepared, 0, 1, _slow, vae_batch_size=2)
    commit(prepared)


if __name__ == "__main__":
    main()

"""Runs a whole prepare, or one worker of it, in a process that a test may kill: PREPARED FOLDER [KIND | RANK WORLD]."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.data.photographs import pooled, settings_for
from trainer.config.sections.data.filters_config import FiltersConfig
from trainer.data.buckets import BucketRules, OtherResolution
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
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


def _slow(pixels: np.ndarray, draw_seeds: np.ndarray) -> np.ndarray:
    time.sleep(0.01)
    return pooled(pixels, draw_seeds)


def main() -> None:
    prepared, folder = Path(sys.argv[1]), Path(sys.argv[2])
    print("ready", flush=True)
    if len(sys.argv) > 4:
        encode_shards(prepared, int(sys.argv[3]), int(sys.argv[4]), _slow, vae_batch_size=2)
        return
    kind = sys.argv[3] if len(sys.argv) > 3 else "plain"
    plan_prepare(settings_for(prepared, folder, **KINDS[kind]), show_progress=False, removed="drop")
    encode_shards(prepared, 0, 1, _slow, vae_batch_size=2)
    commit(prepared)


if __name__ == "__main__":
    main()

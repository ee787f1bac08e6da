"""Runs a whole prepare, or one worker of it, in a process that a test may kill: PREPARED all | RANK WORLD, FOLDER..."""

import sys
import time
from pathlib import Path

import numpy as np

from tests.data.photographs import pooled, settings_for
from trainer.data.prepare.commit import commit
from trainer.data.prepare.encode import encode_shards
from trainer.data.prepare.stages import plan_prepare


def _slow(pixels: np.ndarray, draw_seeds: np.ndarray) -> np.ndarray:
    time.sleep(0.01)
    return pooled(pixels, draw_seeds)


def main() -> None:
    prepared, folder = Path(sys.argv[1]), Path(sys.argv[2])
    print("ready", flush=True)
    if sys.argv[3:]:
        encode_shards(prepared, int(sys.argv[3]), int(sys.argv[4]), _slow, vae_batch_size=2)
        return
    plan_prepare(settings_for(prepared, folder, validation_fraction=0.2), show_progress=False)
    encode_shards(prepared, 0, 1, _slow, vae_batch_size=2)
    commit(prepared)


if __name__ == "__main__":
    main()

"""A real prepared set of two sources, whose images differ in content, shape and brightness."""

from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.photographs import write_crops
from tests.train.real_run import model_of, run_config
from trainer.config.schema import Config, SamplesConfig, ValidationConfig
from trainer.data.prepare.commit import commit
from trainer.data.prepare.stages import is_current, plan_prepare
from trainer.train.workers.prepare_worker import encode_share, prepare_settings

BUCKETS = {"resolution": 128, "min_px": 64, "max_px": 256, "step_px": 64}
TIMESTEPS = [150, 500, 850]


def two_sources(model: Path, root: Path, run: str = "run", also_at: list | None = None, **validation: object) -> Config:
    """The configuration of a run of both, `photos` and `noise`, prepared under `root` when first asked for."""
    if not (root / "photos").exists():
        write_crops(root / "photos", 24)
        (root / "noise").mkdir()
        rng = np.random.default_rng(7)
        for i in range(16):
            size = (128, 128) if i % 2 else (192, 96)
            levels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(levels).save(root / "noise" / f"{i:02d}.png")
            (root / "noise" / f"{i:02d}.txt").write_text(f"noise {i}")
    sources = [{"path": str(root / "photos")}, {"path": str(root / "noise")}]
    data = {"sources": sources, "buckets": {**BUCKETS, "also_at": also_at or []}, "validation_fraction": 0.4}
    config = run_config(model, root / ("prepared-at" if also_at else "prepared"), root / run, data, steps=4)
    wish = ValidationConfig.model_validate({"timesteps": TIMESTEPS, **validation})
    config = config.model_copy(update={"validation": wish, "samples": SamplesConfig(count=2, steps=1)})
    if not is_current(prepare_settings(config, model_of(config))):
        plan_prepare(prepare_settings(config, model_of(config)), show_progress=False)
        encode_share(config, model_of(config))
        commit(config.data.prepared)
    return config

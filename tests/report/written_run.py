"""A run directory as a run leaves it, hostile texts in it, for tests of its page."""

import json
import math
import random
from pathlib import Path

from PIL import Image

HARM = "</script><script>alert(1)</script>/*LIVE*/\x1b[31m"
CONFIG = """
run: {dir: runs/one, seed: 7}
train: {steps: 400, batch_size_per_gpu: 2}
data:
  sources:
  - {path: photos}
  prepared: "%s"
optimizer: {lr: %s}
"""


def write_run(folder: Path, steps: int, lr: str = "1e-5", begun: float = 1e9) -> Path:
    """As a run leaves it: records, events, samples, host, settings."""
    rng = random.Random(3)
    (folder / "samples").mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        values = {
            "loss": 1 / math.sqrt(step) + rng.random() / 10,
            "lr": 1e-5,
            "lr/unet": 1e-5,
            "grad_norm": rng.random(),
        }
        values |= {
            "images_per_s": 4.0,
            "step_s": 2.0,
            "data_wait_s": 0.01,
            "images_seen": 8 * step,
            "epoch": step / 100,
        }
        lines.append(json.dumps({"kind": "train", "step": step, **values, "time": begun + 2 * step}))
        if step % 50 == 0:
            by = {f"loss_t{t}": 1.0 - t / 2000 + 1 / step for t in range(0, 1000, 125)}
            by |= {f"images_t{t}": 50.0 for t in range(0, 1000, 125)}
            lines.append(json.dumps({"kind": "train_by_timestep", "step": step, **by, "time": 1e9 + 2 * step}))
            scores = {"loss": 0.5 + 1 / step, "loss_t100": 0.01, "loss_t900": 0.9}
            if step > 100:  # older records have no intervals
                scores |= {"ci95": 0.02, "ci95/t100": 0.02, "gap": step / 5000 - 0.05, "ci95/gap": 0.03}
                scores |= {"gap/t100": 0.01, "source/photos": 0.4, "ci95/source/photos": 0.1, "source/<b>": 0.6}
            validated = {"step": step, **scores, "time": 1e9 + 2 * step}
            lines += [json.dumps({"kind": kind, **validated}) for kind in ("validation", "validation_ema")]
    lines.insert(0, json.dumps({"kind": "train", "step": 0, "loss": None}))
    lines.append('{"kind": "train", "step": 9')  # cut short
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    (folder / "events.txt").write_text(f"2026-11-29 00:00:00  worker 1 was ended; starting again {HARM}\n")
    (folder / "config.resolved.yaml").write_text(CONFIG % (HARM.replace("\x1b", ""), lr))
    host = [
        {"time": 1e9 + 60 * i, "workers_mib": [2048 + i, 1024], "memory_available_mib": 9000,
         "cards": [{"uuid": "GPU-a", "temperature_c": 60 + i % 9, "power_w": 300.0}]} for i in range(30)
    ]  # fmt: skip
    (folder / "host.jsonl").write_text("".join(json.dumps(each) + "\n" for each in host))
    (folder / "skipped.jsonl").write_text('{"step": 5}\n')
    for step in (100, 200, 300):
        place = folder / "samples" / f"step-{step:08d}-ema"
        place.mkdir()
        for i in range(3):
            Image.new("RGB", (96 + 32 * i, 96), (step % 256, 90 * i, 40)).save(place / f"{i:02d}.png")
        (place / "03.png").write_bytes(b"no image")
    (folder / "checkpoints" / "step-00000300").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000300" / "file").write_bytes(b"0" * 1000)
    return folder

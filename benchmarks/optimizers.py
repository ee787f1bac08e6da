"""What each optimizer makes of the same steps: loss, time and bytes by `optimizer.kind`, as a Markdown table.

    sdxl-train make-tiny --out data/tiny
    python benchmarks/optimizers.py [--steps 200] [--batch 4] [--kinds adamw,lion] [--lr lion=1e-4] [--out FOLDER]

Each kind trains the tiny SDXL at 64 px in a process of its own, on one CPU thread, with the same images, noise and
timesteps, at one learning rate that is usual for the kind, without a sweep. "Loss" is that on held-out images, with
fixed noise; "bytes" are the optimizer's per weight in the checkpoint; "ms/step" is the median of whole steps.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from trainer.checkpoint.run_dir import checkpoint_dir
from trainer.config.sections.optimizer_config import KINDS
from trainer.measure.telemetry import read_metrics
from trainer.model_files.header import read_header

LR = {
    "adamw": 1e-3,
    "adamw_8bit": 1e-3,
    "lion": 2e-4,
    "lion_8bit": 2e-4,
    "adafactor": 3e-2,
    "came": 5e-5,
    "prodigy": 1.0,
    "dadapt_adam": 1.0,
    "schedule_free_adamw": 2e-3,
    "stable_adamw": 1e-3,
    "adopt": 1e-3,
    "muon": 1e-3,
}


def main() -> None:
    """Train with each kind and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", type=Path, default=Path("data/tiny"), help="folder of make-tiny (data/tiny)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--lr", action="append", default=[], metavar="KIND=LR", help="another learning rate")
    parser.add_argument("--out", type=Path, help="where the runs are kept; default: nowhere")
    arguments = parser.parse_args()
    rates = LR | {kind: float(lr) for kind, _, lr in (each.partition("=") for each in arguments.lr)}
    with tempfile.TemporaryDirectory(prefix="optimizers-") as folder:
        out = arguments.out or Path(folder)
        print("| kind | lr | loss at 0 | at the half | at the end | bytes/weight | ms/step |")
        print("|---|---|---|---|---|---|---|")
        for kind in arguments.kinds.split(","):
            print(row(kind, rates[kind], arguments, out.resolve()), flush=True)


def row(kind: str, lr: float, arguments: argparse.Namespace, out: Path) -> str:
    """One kind's."""
    config, run_dir = out / f"{kind}.yaml", out / kind
    out.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(fields(kind, lr, arguments, run_dir), indent=1))  # JSON is YAML
    command = [sys.executable, "-m", "trainer", "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        return f"| {kind} | {lr:g} | failed: {done.stderr.strip().splitlines()[-1]} | | | | |"
    records = read_metrics(run_dir)
    losses = {record["step"]: record["loss"] for record in records if record["kind"] == "validation"}
    seconds = [record["step_s"] for record in records if "step_s" in record]
    at = [losses[step] for step in (0, arguments.steps // 2, arguments.steps)]
    shown, size = " | ".join(f"{loss:.4f}" for loss in at), bytes_per_weight(run_dir, arguments.steps)
    return f"| {kind} | {lr:g} | {shown} | {size:.2f} | {1e3 * median(seconds):.0f} |"


def fields(kind: str, lr: float, arguments: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """The run's configuration."""
    tiny = arguments.tiny.resolve()
    return {
        "run": {"dir": str(run_dir), "seed": 42, "resume": False},
        "launch": {"workers": 1, "threads_per_worker": 1},
        "model": {"path": str(tiny / "model")},
        "data": {
            "sources": [{"path": str(tiny / "photos"), "repeats": 50}],
            "prepared": str(run_dir.parent / "prepared"),
            "buckets": {"resolution": 64, "min_px": 64, "max_px": 64},
            "validation_fraction": 0.25,
            "workers": 0,
        },
        "train": {"steps": arguments.steps, "batch_size_per_gpu": arguments.batch, "precision": "fp32"},
        "optimizer": {"kind": kind, "lr": lr},
        "lr_schedule": {"warmup_steps": min(20, arguments.steps // 2)},
        "validation": {"every_steps": arguments.steps // 2},
        "checkpoint": {"every": "never"},
        "log": {"every_steps": 1},
    }


def bytes_per_weight(run_dir: Path, step: int) -> float:
    """Of the optimizer's tensors, but for the weights that stand among them and the counters."""
    folder = checkpoint_dir(run_dir, step)
    state = read_header(folder / "training_state" / "optimizer.safetensors").tensors
    weights = read_header(folder / "unet" / "diffusion_pytorch_model.safetensors").tensors
    kept = sum(t.num_bytes for name, t in state.items() if t.shape and not name.endswith("-trained"))
    count = sum(t.count for t in weights.values())
    return kept / count


if __name__ == "__main__":
    main()

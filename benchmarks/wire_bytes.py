"""What each exchange of gradients or weights sends, and what becomes of the loss: real workers, as a Markdown table.

    sdxl-train make-tiny --out data/tiny
    python benchmarks/wire_bytes.py [--workers 3] [--steps 128] [--ways plain,int8] [--seeds 7,8] [--whole] [--out DIR]

Each way trains a fresh UNet at 64 px, with the same images, noise and timesteps, on `--workers` processes with one CPU
thread each. It is the tiny SDXL's with a layer and a transformer block in the place of several, which takes a fraction
of the time; `--whole`: as it is. The processes are in a network namespace of their own, where nothing else is sent:
"measured" are the bytes that its loopback device has carried between two steps, those of the small exchanges and of TCP
included, for each worker and step; "by arithmetic" is what `plan` says. The losses are those on held-out images, with
fixed noise: before the first step, at the half and after the last one, and over the last quarter of the steps that of
training; means over `--seeds`, and the standard deviation over them of the last one. "s/step" is the mean of whole
steps, where the wire is memory and costs nothing but the work. Linux only; needs `unshare` and `ip`.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from trainer.measure.telemetry import read_metrics

_PAPER = {"outer_lr": 0.7, "outer_momentum": 0.9}
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"method": "bf16"},
    "int8": {"method": "int8"},
    "int8 at random": {"method": "int8", "error_feedback": False},
    "int4": {"method": "int4"},
    "int4 at random": {"method": "int4", "error_feedback": False},
    "powersgd 4": {"method": "powersgd"},
    "powersgd 16": {"method": "powersgd", "rank": 16},
    "powersgd 4 warm": {"method": "powersgd", "plain_steps": 50},
    "every 8": {"average_every": 8},
    "every 8 int8": {"average_every": 8, "method": "int8"},
    "every 8 momentum": {"average_every": 8, **_PAPER},
    "every 32 momentum": {"average_every": 32, **_PAPER},
    "every 8 by 4 late 2 momentum": {"average_every": 8, "fragments": 4, "overlap_steps": 2, **_PAPER},
}
_SETTLED = 5  # steps after which bytes are counted


def main() -> None:
    """Train in each way and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", type=Path, default=Path("data/tiny"), help="folder of make-tiny (data/tiny)")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2, help="images of a worker in a step")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seeds", default="7", help="of images, noise and timesteps, with commas")
    parser.add_argument("--whole", action="store_true", help="the tiny SDXL's own UNet")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--out", type=Path, help="where the runs are kept; default: nowhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wire-") as folder:
        out = (arguments.out or Path(folder)).resolve()
        out.mkdir(parents=True, exist_ok=True)
        model = arguments.tiny.resolve() / "model" if arguments.whole else shallow_model(arguments.tiny, out / "model")
        head = "| exchange | MB/step by arithmetic | measured | of plain | loss at 0 | at the half | at the end |"
        print(f"{head} training | s/step |\n|---|---|---|---|---|---|---|---|---|", flush=True)
        plain = 0.0
        for way in arguments.ways.split(","):
            runs = [train(way, arguments, out, model, int(seed)) for seed in arguments.seeds.split(",")]
            measured, seconds = mean(run.measured for run in runs), mean(run.seconds for run in runs)
            plain = plain or measured
            losses = [f"{mean(values):.4f}" for values in zip(*(run.losses for run in runs), strict=True)]
            if len(runs) > 1:
                losses[2] += f" ± {stdev(run.losses[2] for run in runs):.4f}"
            counted = f"{runs[0].counted:.2f} | {measured / 1e6:.2f} | {measured / plain:.3f}"
            print(f"| {way} | {counted} | {' | '.join(losses)} | {seconds:.2f} |", flush=True)


def shallow_model(tiny: Path, folder: Path) -> Path:
    """The tiny SDXL with a fresh UNet of fewer layers."""
    if not folder.exists():
        shutil.copytree(tiny / "model", folder, ignore=lambda _, names: {"unet"} & {*names})
        config = dict(UNet2DConditionModel.load_config(tiny / "model" / "unet"))
        torch.manual_seed(0)
        fewer = {"layers_per_block": 1, "transformer_layers_per_block": [1, 1, 1]}
        UNet2DConditionModel.from_config(config | fewer).save_pretrained(folder / "unet")
    return folder


class Trained(NamedTuple):
    """A run: MB that a step sends by arithmetic, bytes measured, four losses, and seconds of a step."""

    counted: float
    measured: float
    losses: tuple[float, float, float, float]
    seconds: float


def train(way: str, arguments: argparse.Namespace, out: Path, model: Path, seed: int) -> Trained:
    """Run through in one way."""
    name = re.sub(r"\W+", "_", way) + f"_{seed}"
    config, run_dir = out / f"{name}.yaml", out / name
    config.write_text(json.dumps(fields(way, arguments, run_dir, model, seed), indent=1))  # JSON is YAML
    inside = f"ip link set lo up && exec {sys.executable} -m trainer train {config}"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(["unshare", "-rn", "sh", "-c", inside], stdout=log, stderr=log, env=env)
        bytes_at = watch(process, run_dir)
    if process.returncode:
        raise RuntimeError((out / f"{name}.log").read_text()[-2000:])
    (first, before), (last, after) = bytes_at[0], bytes_at[-1]
    measured = (after - before) / (last - first) / arguments.workers
    records = read_metrics(run_dir)
    found = {record["step"]: record["loss"] for record in records if record["kind"] == "validation"}
    steps = [record for record in records if record["kind"] == "train"]
    late = mean(record["loss"] for record in steps if record["step"] > 0.75 * arguments.steps)
    losses = found[0], found[arguments.steps // 2], found[arguments.steps], late
    said = re.search(r"each worker sends ([\d.]+) (MB|GB)", (out / f"{name}.log").read_text())
    assert said
    seconds = mean(record["step_s"] for record in steps[_SETTLED:])
    return Trained(float(said[1]) * (1000 if said[2] == "GB" else 1), measured, losses, seconds)


def watch(process: "subprocess.Popen[bytes]", run_dir: Path) -> list[tuple[int, int]]:
    """Steps that have been written down, each with the bytes sent so far, until the process ends."""
    seen: list[tuple[int, int]] = []
    file = run_dir / "metrics.jsonl"
    while process.poll() is None:
        time.sleep(0.05)
        try:
            lines, sent = file.read_bytes().count(b'"kind": "train"'), loopback_bytes(process.pid)
        except OSError:
            continue
        if lines >= _SETTLED and (not seen or lines > seen[-1][0]):
            seen.append((lines, sent))
    if len(seen) < 2:
        raise RuntimeError(f"{file}: too few steps to count bytes")
    return seen


def loopback_bytes(pid: int) -> int:
    """What the loopback device of a process's network has sent."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        device, _, numbers = line.partition(":")
        if device.strip() == "lo":
            return int(numbers.split()[8])
    raise OSError(f"process {pid} has no loopback device")


def fields(way: str, arguments: argparse.Namespace, run_dir: Path, model: Path, seed: int) -> dict[str, Any]:
    """The run's configuration."""
    tiny, workers = arguments.tiny.resolve(), arguments.workers
    return {
        "run": {"dir": str(run_dir), "seed": seed},
        "launch": {"workers": workers, "threads_per_worker": 1, "hang_after_s": 3600},  # on a busy machine
        "model": {"path": str(model)},
        "data": {
            "sources": [{"path": str(tiny / "photos"), "repeats": 50}],
            "prepared": str(run_dir.parent / "prepared"),
            "buckets": {"resolution": 64, "min_px": 64, "max_px": 64, "step_px": 64},
            "validation_fraction": 0.25,
            "workers": 0,
        },
        "train": {
            "steps": arguments.steps,
            "batch_size_per_gpu": arguments.batch,
            "global_batch_size": arguments.batch * workers,
            "precision": arguments.precision,
        },
        "optimizer": {"lr": arguments.lr},
        "checkpoint": {"every": "never"},
        "validation": {"every_steps": arguments.steps // 2},
        "memory": {"strategy": "ddp"},
        "exchange": WAYS[way],
    }


if __name__ == "__main__":
    main()

"""What each exchange of gradients sends, and what becomes of the loss: real workers, as a Markdown table.

    sdxl-train make-tiny --out data/tiny
    python benchmarks/wire_bytes.py [--workers 3] [--steps 200] [--ways plain,int8] [--precision fp32] [--out FOLDER]

Each way trains the tiny SDXL at 64 px, with the same images, noise and timesteps, on `--workers` processes with one CPU
thread each. They are in a network namespace of their own, where nothing else is sent: "measured" are the bytes that its
loopback device has carried between two steps, those of the small exchanges and of TCP included, for each worker and
step; "by arithmetic" is what `plan` says. "Loss" is that on held-out images, with fixed noise, after the last step.
"s/step" is the median of whole steps on this machine, where the wire is memory and costs nothing but the work.
Linux only; needs `unshare` and `ip`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from trainer.measure.telemetry import read_metrics

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"method": "bf16"},
    "int8": {"method": "int8"},
    "int8 at random": {"method": "int8", "error_feedback": False},
    "int4": {"method": "int4"},
    "int4 at random": {"method": "int4", "error_feedback": False},
    "powersgd 4": {"method": "powersgd"},
    "powersgd 16": {"method": "powersgd", "rank": 16},
}
_SETTLED = 5  # steps after which bytes are counted


def main() -> None:
    """Train in each way and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", type=Path, default=Path("data/tiny"), help="folder of make-tiny (data/tiny)")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2, help="images of a worker in a step")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--seed", type=int, default=7, help="of images, noise and timesteps")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--out", type=Path, help="where the runs are kept; default: nowhere")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wire-") as folder:
        out = (arguments.out or Path(folder)).resolve()
        print(
            "| exchange | MB/step by arithmetic | measured | of plain | loss at 0 | at the half | at the end | s/step |"
        )
        print("|---|---|---|---|---|---|---|---|")
        plain = 0.0
        for way in arguments.ways.split(","):
            counted, measured, losses, seconds = train(way, arguments, out)
            plain = plain or measured
            shown = " | ".join(f"{loss:.4f}" for loss in losses)
            print(
                f"| {way} | {counted:.2f} | {measured / 1e6:.2f} | {measured / plain:.3f} | {shown} | {seconds:.2f} |",
                flush=True,
            )


def train(way: str, arguments: argparse.Namespace, out: Path) -> tuple[float, float, list[float], float]:
    """MB that a step sends by arithmetic, bytes measured, three losses, and seconds."""
    name = re.sub(r"\W", "_", way)
    config, run_dir = out / f"{name}.yaml", out / name
    out.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(fields(way, arguments, run_dir), indent=1))  # JSON is YAML
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
    losses = [found[step] for step in (0, arguments.steps // 2, arguments.steps)]
    seconds = median(record["step_s"] for record in records if "step_s" in record)
    said = re.search(r"each worker sends ([\d.]+) (MB|GB)", (out / f"{name}.log").read_text())
    assert said
    return float(said[1]) * (1000 if said[2] == "GB" else 1), measured, losses, seconds


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


def fields(way: str, arguments: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """The run's configuration."""
    tiny, workers = arguments.tiny.resolve(), arguments.workers
    return {
        "run": {"dir": str(run_dir), "seed": arguments.seed},
        "launch": {"workers": workers, "threads_per_worker": 1},
        "model": {"path": str(tiny / "model")},
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

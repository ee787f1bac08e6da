"""How far several cards that share a model over NCCL come from one card alone; prints each row as JSON.

    python benchmarks/gpu_exactness.py [--steps 20] [--device cuda|cpu] [--workers 4] [--runs ddp:fp32:1 ...]

The runs are those of tests/train/test_shared_runs.py, STRATEGY:PRECISION:ACCUMULATION, with one process per card;
there they are compared on the CPU, over gloo, as here with `--device cpu`. One card is compared with itself as well:
some of CUDA's kernels add in an order of their own, and differences of that size say nothing of the exchange.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "train" / "shared_run_script.py"
IN_FP32 = ("ddp:fp32:1", "ddp:fp32:3", "zero2:fp32:3", "zero2+:fp32:3", "zero3:fp32:1")
IN_BF16 = ("ddp:bf16:1", "zero2:bf16:3", "zero3:bf16:1")
LIMIT_S = 1200.0


def main() -> None:
    """Run on one card, on several, and print a row for each way to share."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--workers", type=int, choices=[2, 4], help="default: as many as there are cards for")
    parser.add_argument("--runs", nargs="+", choices=IN_FP32 + IN_BF16, help="default: all that the card computes")
    arguments = parser.parse_args()

    import torch

    workers, runs = arguments.workers, arguments.runs
    if arguments.device == "cuda":
        # The 12 images of a step go evenly into 2 or 4 parts of 3 passes.
        workers = workers or (4 if torch.cuda.device_count() >= 4 else 2)
        if torch.cuda.device_count() < workers:
            sys.exit(f"{workers} workers need as many cards, and here are {torch.cuda.device_count()}")
        runs = runs or (IN_FP32 + IN_BF16 if torch.cuda.get_device_capability() >= (8, 0) else IN_FP32)
    with tempfile.TemporaryDirectory(prefix="exactness-") as folder:
        for row in compared(Path(folder), arguments.device, workers or 2, arguments.steps, runs or IN_FP32 + IN_BF16):
            print(json.dumps(row), flush=True)


def compared(folder: Path, device: str, workers: int, steps: int, runs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What each run is, and its largest differences."""
    alone, again, shared = (folder / name for name in ("alone", "again", "shared"))
    singles = sorted({f"single:{name.split(':')[1]}:1" for name in runs})
    for out in (alone, again):
        take_steps(out, device, 1, steps, singles)
    many, one = ("cards over NCCL", "card") if device == "cuda" else ("workers over gloo", "worker")
    for single in singles:
        yield f"exactness: {single}, one {one} against itself, {steps} steps", differences(alone, single, again, single)
    for name in runs:
        take_steps(shared, device, workers, steps, [name])
        single = f"single:{name.split(':')[1]}:1"
        told = differences(alone, single, shared, name)
        yield f"exactness: {name}, {workers} {many} against one {one}, {steps} steps", told


def differences(one: Path, one_name: str, other: Path, other_name: str) -> str:
    """The largest of losses and of weights between two runs."""
    files = one / f"{one_name}.safetensors", other / f"{other_name}.safetensors"
    losses: list[list[float]] = []
    for file in files:
        with safe_open(file, framework="pt") as opened:
            losses.append(json.loads(opened.metadata()["losses"]))
    of_losses = max(abs(a - b) for a, b in zip(*losses, strict=True))
    weights, expected = map(load_file, files)
    if weights.keys() != expected.keys():
        raise ValueError(f"{other_name} has other weights than {one_name}")
    of_weights = max(float((weights[name].float() - expected[name].float()).abs().max()) for name in weights)
    return f"largest difference of losses {of_losses:.1e} (last loss {losses[0][-1]:.4f}), of weights {of_weights:.1e}"


def take_steps(folder: Path, device: str, workers: int, steps: int, runs: Sequence[str]) -> None:
    """Run the script in so many processes, and leave none of them behind."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(workers), "LOCAL_WORLD_SIZE": str(workers)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "SDXL_TRAIN_DEVICE": device}
    env["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(SCRIPT), str(folder), str(steps), *runs]
    # Standard output is for rows.
    started = [
        subprocess.Popen(command, env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=sys.stderr)
        for rank in range(workers)
    ]
    deadline = time.monotonic() + LIMIT_S
    try:
        while any(worker.poll() is None for worker in started):
            for rank, worker in enumerate(started):
                if worker.poll():
                    raise RuntimeError(f"{', '.join(runs)}: worker {rank} ended with exit code {worker.returncode}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{', '.join(runs)}: not done after {LIMIT_S:.0f} s")
            time.sleep(0.1)
        if any(worker.returncode for worker in started):
            raise RuntimeError(f"{', '.join(runs)}: exit codes {[worker.returncode for worker in started]}")
    finally:
        for worker in started:
            worker.kill()
            worker.wait()


if __name__ == "__main__":
    main()

"""Speed and memory of one optimizer step, by kind of moments and rounding, as a Markdown table.

    python benchmarks/optimizer_speed.py [--weights 200e6] [--threads 2] [--device cpu|cuda] [--compiled]

Weights in matrices as SDXL's UNet has them. Time is the best of three steps. "Bytes" are those of weights and
optimizer state per weight, gradients aside; "extra" is the step's peak beside weights, gradients and state.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

KINDS = ("adamw", "adamw_8bit")
ROUNDINGS = ("fp32", "stochastic", "kahan")
SHAPES = ((10240, 1280), (1280, 5120), (1280, 1280), (1280, 2048), (1280, 1280, 3, 3), (640, 640), (10240,), (1280,))


def main() -> None:
    """Measure each kind in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=float, default=200e6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--compiled", action="store_true", help="fuse the arithmetic with torch.compile")
    parser.add_argument("--only", nargs=2, metavar=("KIND", "ROUNDING"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print(json.dumps(measure(*arguments.only, arguments)))
        return
    print("| moments | weights | M weights/s | CPU ns/weight | bytes/weight | extra MB | load |")
    print("|---|---|---|---|---|---|---|")
    for kind in KINDS:
        for rounding in ROUNDINGS:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", kind, rounding]
            env = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
            row = json.loads(done.stdout.splitlines()[-1])
            weights = "fp32" if rounding == "fp32" else f"bf16, {rounding}"
            print(
                f"| {kind} | {weights} | {row['per_s'] / 1e6:.0f} | {row['cpu_ns']:.1f} | {row['bytes']:.2f} "
                f"| {row['extra_bytes'] / 1e6:.0f} | {os.getloadavg()[0]:.1f} |",
                flush=True,
            )


def measure(kind: str, rounding: str, arguments: argparse.Namespace) -> dict[str, float]:
    """One kind's figures."""
    import torch

    from trainer.config.schema import OptimizerConfig
    from trainer.optim.adamw_chunk import compiled_update
    from trainer.optim.optimizers import make_optimizer, optimizer_tensors

    torch.set_num_threads(arguments.threads)
    named = make_weights(arguments.weights, torch.float32 if rounding == "fp32" else torch.bfloat16, arguments.device)
    rounded = None if rounding == "fp32" else rounding
    fuses = arguments.compiled and not (kind == "adamw" and rounded is None)
    optimizer = make_optimizer(
        named,
        OptimizerConfig.model_validate({"lr": 1.5e-6, "kind": kind}),
        rounding=rounded,
        update=compiled_update(kind == "adamw_8bit", rounded, torch.device(arguments.device)) if fuses else None,
    )
    optimizer.step()  # makes the state
    synchronize(arguments.device)
    held = reset_peak(arguments.device)
    best_wall, best_cpu = float("inf"), float("inf")
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        optimizer.step()
        synchronize(arguments.device)
        best_wall = min(best_wall, time.perf_counter() - wall)
        best_cpu = min(best_cpu, time.process_time() - cpu)
    extra = peak(arguments.device) - held
    count = sum(p.numel() for p in named.values())
    kept = [*named.values(), *optimizer_tensors(optimizer, named).values()]
    bytes_kept = sum(tensor.nbytes for tensor in kept)
    return {
        "per_s": count / best_wall,
        "cpu_ns": best_cpu / count * 1e9,
        "bytes": bytes_kept / count,
        "extra_bytes": extra,
    }


def make_weights(count: float, dtype: "torch.dtype", device: str) -> "dict[str, nn.Parameter]":
    """About `count` weights with gradients."""
    import torch
    from torch import nn

    generator = torch.Generator(device).manual_seed(0)
    named: dict[str, nn.Parameter] = {}
    while sum(p.numel() for p in named.values()) < count:
        shape = SHAPES[len(named) % len(SHAPES)]
        value = torch.empty(shape, dtype=dtype, device=device).normal_(0, 0.02, generator=generator)
        parameter = nn.Parameter(value)
        parameter.grad = torch.empty_like(value).normal_(0, 1e-4, generator=generator)
        named[f"weight.{len(named)}"] = parameter
    return named


def synchronize(device: str) -> None:
    """Wait for what the GPU still has to do."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def reset_peak(device: str) -> float:
    """Start to watch for the peak; return the bytes held now."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resource_bytes("VmRSS")


def peak(device: str) -> float:
    """The most bytes held since `reset_peak`."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resource_bytes("VmHWM")


def resource_bytes(field: str) -> float:
    """A field of /proc/self/status."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return float(line.split()[1]) * 1024


if __name__ == "__main__":
    main()

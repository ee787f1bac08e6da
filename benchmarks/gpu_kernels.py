"""Attention's kernels and TF32, timed on one device; prints each row as JSON, for benchmarks/gpu.py.

    python benchmarks/gpu_kernels.py attention|tf32 [--device cuda|cpu] [--dry]

A process of its own, so that all it took of the card is given back, CUDA's context and libraries included.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)


def main() -> None:
    """Measure, and print a row as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=["attention", "tf32"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--dry", action="store_true", help="small matrices, few runs")
    arguments = parser.parse_args()
    section = attention if arguments.section == "attention" else tf32
    for row in section(arguments.device, arguments.dry):
        print(json.dumps(row), flush=True)


def attention(device: str, dry: bool) -> Iterator[tuple[str, str]]:
    """Forward and backward of SDPA's backends at SDXL's two widths, self and cross attention, 1024 px, batch 1."""
    shapes = ((10, 4096, 4096), (20, 1024, 1024), (10, 4096, 231)) if not dry else ((2, 64, 64),)
    # is_bf16_supported() says yes to emulation as well.
    has_bf16 = device == "cpu" or torch.cuda.get_device_capability() >= (8, 0)
    dtype = torch.bfloat16 if has_bf16 else torch.float16
    for heads, rows, columns in shapes:
        q, k, v = (
            torch.randn(1, heads, length, 64, device=device, dtype=dtype, requires_grad=True)
            for length in (rows, columns, columns)
        )
        found = []
        for backend in BACKENDS:

            def once(backend: SDPBackend = backend, q: Any = q, k: Any = k, v: Any = v) -> None:
                with sdpa_kernel(backend):
                    F.scaled_dot_product_attention(q, k, v).sum().backward()

            try:
                found.append(f"{backend.name.lower()} {milliseconds(device, dry, once):.2f} ms")
            except RuntimeError:
                found.append(f"{backend.name.lower()} not there")
        yield f"SDPA forward + backward, {heads} heads, {rows} x {columns}, {str(dtype)[6:]}", ", ".join(found)


def tf32(device: str, dry: bool) -> Iterator[tuple[str, str]]:
    """What TF32 gives fp32 products and convolutions, which are left to frozen parts."""
    from trainer.optim.precision import set_fp32_arithmetic

    side = 64 if dry else 4096
    one, two = (torch.randn(side, side, device=device) for _ in range(2))
    images = torch.randn(1, 16 if dry else 256, side // 8, side // 8, device=device)
    kernel = torch.randn(images.shape[1], images.shape[1], 3, 3, device=device)
    for what, function in (
        (f"product of {side} x {side}", lambda: torch.mm(one, two)),
        (f"convolution of {tuple(images.shape)}", lambda: F.conv2d(images, kernel, padding=1)),
    ):
        times = []
        for precision in ("fp32", "bf16"):
            set_fp32_arithmetic(precision)
            times.append(milliseconds(device, dry, function))
        measured = f"{times[0]:.2f} ms in fp32, {times[1]:.2f} ms in TF32"
        if device == "cpu":
            measured = f"not measured: no GPU here ({times[0]:.2f} ms on the CPU)"
        yield f"{what}, forward", measured


def milliseconds(device: str, dry: bool, once: Callable[[], object]) -> float:
    """The best of several runs."""
    best = float("inf")
    for _ in range(3 if dry else 20):
        if device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        once()
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return best * 1e3


if __name__ == "__main__":
    main()

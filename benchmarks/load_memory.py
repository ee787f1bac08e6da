"""Host memory of several worker processes that load one model at the same time, all of it onto the CPU.

    python benchmarks/load_memory.py [--file model.safetensors | --gb 1.5] [--workers 4] [--dtype bf16]

Prints the proportional set size (PSS: memory of one's own, and a share of what is shared) of each worker and of all,
at most and at the end, beyond what the imports take; and how much of the file lies in the page cache. What they may
take together is the file once and each worker's weights.
"""

import argparse
import ctypes
import ctypes.util
import json
import mmap
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

GB = 1e9
PARTS = ("unet", "text encoders", "vae")


def main() -> None:
    """Print the table; exit code 1 if the workers take more than they may."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", type=Path, help="any model that `model.path` may name; default: random weights")
    parser.add_argument("--gb", type=float, help="size of the file of random weights; default: SDXL's own, 6.9 GB")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--dtype", default="bf16", choices=["fp16", "bf16", "fp32"], help="of the loaded weights")
    parser.add_argument("--dir", type=Path, default=Path(tempfile.gettempdir()), help="for the file of random weights")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.file, arguments.dtype)
    elif arguments.file:
        sys.exit(measure(arguments.file, arguments.workers, arguments.dtype))
    else:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
            file = Path(folder) / "random.safetensors"
            size = ["--gb", str(arguments.gb)] if arguments.gb else []
            script = Path(__file__).with_name("random_model.py")
            subprocess.run([sys.executable, str(script), "--out", str(file), *size], check=True)
            sys.exit(measure(file, arguments.workers, arguments.dtype))


def work(model: Path, dtype_name: str) -> None:
    """Import, wait for the word, load everything, wait to be ended; the weights' bytes go to standard output."""
    import torch

    from trainer.model.load_weights import load_text_encoders, load_unet, load_vae
    from trainer.model_files.run_model import open_model

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype_name]
    import diffusers.models.autoencoders.autoencoder_kl
    import diffusers.models.unets.unet_2d_condition
    import transformers

    assert transformers.CLIPTextModel and diffusers.models.unets.unet_2d_condition
    tell({"imported": True})
    opened = open_model(model)
    encoders = load_text_encoders(opened, dtype, "cpu")
    modules = [load_unet(opened, dtype, "cpu"), encoders.one, encoders.two, load_vae(opened, dtype, "cpu")]
    tell({"weights": sum(p.numel() * p.itemsize for module in modules for p in module.parameters())})


def tell(what: dict[str, Any]) -> None:
    """One line to the parent; then wait for its answer."""
    print(json.dumps(what), flush=True)
    sys.stdin.readline()


def measure(model: Path, workers: int, dtype: str) -> int:
    """Load in all workers at once and watch them."""
    command = [sys.executable, __file__, "--worker", "--file", str(model), "--dtype", dtype]
    started = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(workers)]
    try:
        for process in started:
            hear(process)
        watched = [psutil.Process(process.pid) for process in started]
        base = [pss(process) for process in watched]
        began = time.monotonic()
        for process in started:
            answer(process)
        peaks, peak_of_all = list(base), 0
        while not all(ready(process) for process in started):
            now = [pss(process) for process in watched]
            peaks = [max(pair) for pair in zip(peaks, now, strict=True)]
            peak_of_all = max(peak_of_all, sum(now) - sum(base))
            time.sleep(0.02)
        took_s = time.monotonic() - began
        weights = [hear(process)["weights"] for process in started]
        steady = [pss(process) for process in watched]
        peaks = [max(pair) for pair in zip(peaks, steady, strict=True)]
        peak_of_all = max(peak_of_all, sum(steady) - sum(base))
        for process in started:
            answer(process)
    finally:
        for process in started:
            process.kill()
            process.wait()
    files = [model] if model.is_file() else sorted(model.rglob("*.safetensors"))
    return report(sum(file.stat().st_size for file in files), sum(map(cached_bytes, files)),
                  base, peaks, steady, peak_of_all, weights, took_s)  # fmt: skip


def report(
    file: int,
    cached: int,
    base: list[int],
    peaks: list[int],
    steady: list[int],
    peak_of_all: int,
    weights: list[int],
    took_s: float,
) -> int:
    """The table, and the exit code."""
    steady_of_all, allowed = sum(steady) - sum(base), file + sum(weights)
    print(f"file {file / GB:.2f} GB, of which {cached / GB:.2f} GB lie in the page cache; loaded in {took_s:.1f} s")
    print("| worker | imports, GB | weights, GB | most PSS beyond imports, GB | PSS beyond imports at the end, GB |")
    print("|---|---|---|---|---|")
    for rank in range(len(base)):
        values = (base[rank], weights[rank], peaks[rank] - base[rank], steady[rank] - base[rank])
        print(f"| {rank} | " + " | ".join(f"{value / GB:.2f}" for value in values) + " |")
    values = (sum(base), sum(weights), peak_of_all, steady_of_all)
    print("| all | " + " | ".join(f"{value / GB:.2f}" for value in values) + " |")
    holds = peak_of_all <= allowed
    rule = f"file + {len(base)} x weights = {allowed / GB:.2f} GB: {'holds' if holds else 'DOES NOT HOLD'}"
    print(f"all workers at most {peak_of_all / GB:.2f} GB PSS beyond their imports; {rule}")
    return 0 if holds else 1


def pss(process: psutil.Process) -> int:
    """Proportional set size in bytes."""
    return process.memory_full_info().pss


def hear(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """A worker's next line."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a worker ended with exit code {process.wait()}")
    return json.loads(line)


def ready(process: subprocess.Popen[bytes]) -> bool:
    """Whether a worker has told something, or ended."""
    import select

    return bool(select.select([process.stdout], [], [], 0)[0])


def answer(process: subprocess.Popen[bytes]) -> None:
    """Let a worker go on."""
    assert process.stdin is not None
    process.stdin.write(b"\n")
    process.stdin.flush()


def cached_bytes(file: Path) -> int:
    """How much of a file is in the page cache, by mincore(2)."""
    size = file.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    with file.open("r+b") as stream, mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_WRITE) as mapped:
        start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages):
            raise OSError(ctypes.get_errno(), "mincore")
    return sum(page & 1 for page in pages) * mmap.PAGESIZE


if __name__ == "__main__":
    main()

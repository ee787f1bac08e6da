"""Everything that needs a GPU, measured and added to docs/benchmarks.md; run it by benchmarks/gpu.sh.

What fails is told in its row, and the rest goes on. Weights are random, of SDXL's own size, unless --model is given.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu_rows import (
    NOT_MEASURED,
    ROOT,
    failure,
    label,
    lines_of,
    product,
    run,
    script_rows,
    table_rows,
    tell,
    told,
)


@dataclass(frozen=True)
class Bench:
    """What all sections share.

    Attributes:
        folder: for the model and the runs.
        dry: a tiny model, few steps, small matrices.
    """

    folder: Path
    dry: bool
    model: Path
    tokenizer: Path
    batch_sizes: str
    steps: int
    device: str


def main() -> None:
    """Run the sections, print their rows and add them to the document; exit code 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="a tiny model on any device; writes to no document")
    parser.add_argument("--dir", type=Path, help="where model and runs are written (default: a temporary folder)")
    parser.add_argument("--model", type=Path, help="a model in place of random weights")
    parser.add_argument("--docs", type=Path, help="the document (default: docs/benchmarks.md; none in a dry run)")
    parser.add_argument("--batch-sizes", default="1,2,4")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of each bench (default: 10)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="some sections alone")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="N",
        help="the proof in their place: what says most first, on one card of 24 GB or more, nothing begun that would "
        "not be done in time",
    )
    arguments = parser.parse_args()

    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu and not arguments.dry:
        sys.exit(f"{NOT_MEASURED}; `benchmarks/gpu.sh --dry` tries the commands out on a tiny model")
    docs = arguments.docs or (None if arguments.dry else ROOT / "docs" / "benchmarks.md")
    card = torch.cuda.get_device_name(0) if has_gpu else "CPU, dry run"
    cards = f"{torch.cuda.device_count()} x {card}" if has_gpu else card
    begin, device = time.monotonic(), "cuda" if has_gpu else "cpu"
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=arguments.dir) as temporary:
        bench, told_to = prepared(Path(temporary), arguments, device), partial(tell, docs, cards)
        if arguments.minutes:
            good = prove(bench, begin + 60 * arguments.minutes, told_to)
        else:
            finish(writing_model(bench.model))
            good = sum(not section(name, bench, told_to) for name in arguments.only) == 0
    sys.exit(0 if good else 1)


def prepared(folder: Path, arguments: argparse.Namespace, device: str) -> Bench:
    """Make the tokenizer and the tiny model; one of random weights is still to be written."""
    from trainer.model_files.clip_tokenizer import write_clip_tokenizer
    from trainer.tiny.tiny_model import write_tiny_model

    tokenizer, tiny = folder / "tokenizer", folder / "tiny"
    write_clip_tokenizer(tokenizer, "<|endoftext|>")
    write_tiny_model(tiny)
    model = tiny if arguments.dry else arguments.model or folder / "random.safetensors"
    steps, batch_sizes = (2, "1") if arguments.dry else (arguments.steps, arguments.batch_sizes)
    return Bench(folder, arguments.dry, model, tokenizer, batch_sizes, steps, device)


def writing_model(model: Path) -> subprocess.Popen[bytes] | None:
    """A process that writes a model of random weights; None where there is a model."""
    command = [sys.executable, ROOT / "benchmarks" / "random_model.py", "--out", model]
    return None if model.exists() else subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})


def finish(writing: subprocess.Popen[bytes] | None) -> None:
    """Wait for it."""
    if writing and writing.wait():
        raise RuntimeError(f"the model of random weights: exit code {writing.returncode}")


def section(name: str, bench: Bench, told_to: Callable[[str, str], None]) -> bool:
    """Tell its rows as they come; whether it went well."""
    print(f"== {name}", file=sys.stderr, flush=True)
    try:
        for row in SECTIONS[name](bench):
            told_to(*row)
    except Exception as error:
        told_to(name, failure(error))
        return False
    return True


def prove(bench: Bench, deadline: float, told_to: Callable[[str, str], None]) -> bool:
    """What says most first, and nothing that by its forecast would not end before the deadline.

    Args:
        deadline: of `time.monotonic`.

    Returns:
        Whether all that began went well.
    """
    writing = writing_model(bench.model)
    try:
        good = section("environment", bench, told_to)
        good &= section("tests", replace(bench, dry=True), told_to)
        tiny = replace(bench, model=bench.folder / "tiny", dry=True)
        good &= proof_tasks(tiny, ["agreement"], deadline, told_to)
        finish(writing)
    finally:
        if writing:
            writing.kill()
    return proof_tasks(bench, FULL_SIZE_TASKS, deadline, told_to) and good


def proof_tasks(bench: Bench, names: Sequence[str], deadline: float, told_to: Callable[[str, str], None]) -> bool:
    """Tasks of gpu_proof.py, in one process; where that dies, the rest go on in another."""
    precision = "bf16_stochastic" if bf16_works(bench) else "fp16"
    lean = {"optimizer": {"lr": 1e-6, "kind": "adamw_8bit"}, "train": {"steps": 1, "precision": precision}}
    lean["memory"] = {"budget": "23GiB"}
    good, left = True, list(names)
    configs = ["--unet", write_config(bench, "unet", lean), "--everything", everything(bench, lean)]
    while left and (seconds := deadline - time.monotonic()) > 0:
        options = ["--seconds", f"{seconds:.0f}", *["--dry"] * bench.dry, "--only", *left]
        left, now = [], "the start of the proof"
        try:
            for line in lines_of([sys.executable, "-m", "benchmarks.gpu_proof", *configs, *options], seconds):
                told_now = json.loads(line)
                if isinstance(told_now, list):
                    told_to(*told_now)
                elif "failed" in told_now:
                    good = False
                    told_to(told_now["failed"], told_now["why"])
                else:
                    now, left = told_now["begins"], told_now["then"]
                    print(f"== {now}, about {told_now['forecast_s']:.0f} s", file=sys.stderr, flush=True)
        except RuntimeError as error:
            late = time.monotonic() >= deadline
            good &= late
            told_to(now, "stopped at the end of the time, after more than its forecast" if late else failure(error))
    return good


def environment(bench: Bench) -> Iterator[tuple[str, str]]:
    """Driver, libraries, and which cards reach each other's memory."""
    import torch

    yield "torch, CUDA, cuDNN", f"{torch.__version__}, {torch.version.cuda}, {torch.backends.cudnn.version()}"
    if bench.device == "cpu":
        yield "driver, NCCL, P2P", NOT_MEASURED
        return
    query = ["nvidia-smi", "--query-gpu=driver_version,memory.total,power.limit", "--format=csv,noheader"]
    yield "driver, memory, power limit of each card", "; ".join(run(query).splitlines())
    nccl = torch.cuda.nccl
    yield "NCCL", ".".join(map(str, nccl.version()))
    count = torch.cuda.device_count()
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    reach = sum(torch.cuda.can_device_access_peer(a, b) for a, b in pairs)
    yield "ordered pairs of cards with P2P", f"{reach} of {len(pairs)}"


def tests(bench: Bench) -> Iterator[tuple[str, str]]:
    """Those of the suite that run on a GPU, or whose arithmetic does."""
    files = (
        ["tests/test_gpu.py"] if bench.dry else ["tests/test_gpu.py", "tests/train", "tests/model", "tests/parallel"]
    )
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "not e2e and not slow", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else done.stderr[-200:]
    yield f"`pytest {' '.join(files)}`", last
    if done.returncode:
        raise RuntimeError(f"pytest ended with exit code {done.returncode}")


def strategies(bench: Bench) -> Iterator[tuple[str, str]]:
    """Strategies and batch sizes, planned memory against measured: all of SDXL, and all of the UNet."""
    yield from bench_rows(bench, "everything", everything(bench), ["--compile"] if not bench.dry else [])
    config = write_config(bench, "unet", {})
    if not bench.dry:
        yield from bench_rows(bench, "UNet", config, [])
    lean = lean_settings(bench)
    yield from bench_rows(bench, f"UNet, {' '.join(lean)}", config, lean)


def variants(bench: Bench) -> Iterator[tuple[str, str]]:
    """The UNet at batch 1 in other layouts and precisions, on settings that fit."""
    config, lean = write_config(bench, "variants", {}), lean_settings(bench)
    changes = ["train.channels_last=false", "train.channels_last=true", "train.compile=blocks"]
    for change in changes + ["train.precision=bf16_kahan"] * bf16_works(bench):
        settings = [*lean, change]
        yield from bench_rows(bench, f"UNet, {' '.join(settings)}", config, settings, batch_sizes="1")


def activations(bench: Bench) -> Iterator[tuple[str, str]]:
    """A step with the activations of no block in the host's memory, of some, copied beside the passes, and all."""
    config, lean = write_config(bench, "activations", {}), lean_settings(bench)
    for moved in ("false", "10", "20", "true"):
        settings = [*lean, "memory.recompute=none", f"memory.offload_activations={moved}"]
        yield from bench_rows(bench, f"UNet, {' '.join(settings[-2:])}", config, settings, batch_sizes="1")


def lean_settings(bench: Bench) -> list[str]:
    """What all of the UNet takes to fit on one card of 24 GB (of 32 GB without bf16)."""
    precision = "bf16_stochastic" if bf16_works(bench) else "fp16"
    return [f"train.precision={precision}", "optimizer.kind=adamw_8bit"]


def bench_rows(
    bench: Bench, what: str, config: Path, options: Sequence[str], batch_sizes: str | None = None
) -> Iterator[tuple[str, str]]:
    """The rows of one `sdxl-train bench`."""
    out = bench.folder / f"{config.stem}.json"
    sizes = batch_sizes or bench.batch_sizes
    warmup = "1" if bench.dry else "3"
    arguments = ["--steps", bench.steps, "--warmup", warmup, "--batch-sizes", sizes, "--out", out, *options]
    out.unlink(missing_ok=True)
    done = subprocess.run(product("bench", config, *arguments), cwd=ROOT, stdout=sys.stderr)
    if not out.is_file():
        raise RuntimeError(f"sdxl-train bench ended with exit code {done.returncode}")
    report = json.loads(out.read_text(encoding="utf-8"))
    for row in report["rows"]:
        yield f"bench: {what}, {label(row)}", row["error"] or told(row, report["precision"])


def attention(bench: Bench) -> Iterator[tuple[str, str]]:
    """SDPA's backends."""
    yield from script_rows("gpu_kernels.py", "attention", "--device", bench.device, *["--dry"] * bench.dry)


def tf32(bench: Bench) -> Iterator[tuple[str, str]]:
    """What TF32 gives."""
    yield from script_rows("gpu_kernels.py", "tf32", "--device", bench.device, *["--dry"] * bench.dry)


def exactness(bench: Bench) -> Iterator[tuple[str, str]]:
    """Several cards against one, over NCCL."""
    import torch

    what = "exactness: ddp, zero2, zero3 over NCCL against one card"
    if bench.device == "cpu":
        yield what, f"{NOT_MEASURED}; tests/train/test_shared_runs.py compares over gloo on the CPU"
    elif torch.cuda.device_count() < 2:
        yield what, "not measured: one card here, and it takes two"
    else:
        yield from script_rows("gpu_exactness.py")


def optimizer(bench: Bench) -> Iterator[tuple[str, str]]:
    """AdamW in its kinds of state and rounding, its arithmetic as it is and fused by torch.compile."""
    script = ROOT / "benchmarks" / "optimizer_speed.py"
    if bench.dry:
        row = json.loads(
            run([sys.executable, script, "--weights", "1e6", "--only", "adamw", "stochastic"]).splitlines()[-1]
        )
        yield "optimizer: adamw, bf16, stochastic", f"{NOT_MEASURED} ({row['bytes']:.2f} bytes a weight on the CPU)"
        return
    for options, how in (([], "not compiled"), (["--compiled"], "compiled")):
        for row in table_rows(lines_of([sys.executable, script, "--device", "cuda", *options])):
            told = f"{row['M weights/s']} million weights/s, {row['bytes/weight']} bytes a weight"
            yield f"optimizer: {row['moments']}, {row['weights']}, {how}", f"{told}, {row['extra MB']} MB beside"


def full_size(bench: Bench) -> Iterator[tuple[str, str]]:
    """Photographs from the file to the export, with 20 training steps, on one card."""
    if bench.dry:
        yield "full size: inspect, prepare, 20 steps, export", "left out in a dry run; benchmarks/full_size.py"
        return
    command = [sys.executable, ROOT / "benchmarks" / "full_size.py", "--dir", bench.folder / "full", "--steps", "20"]
    for row in table_rows(lines_of(command)):
        yield f"full size: {row['stage']}", f"{row['wall']}, host RSS {row['peak RSS']}"


def everything(bench: Bench, more: dict[str, Any] | None = None) -> Path:
    """The UNet and both text encoders, 225 tokens."""
    trainable = {"text_encoder_1": {"train": True}, "text_encoder_2": {"train": True}}
    return write_config(bench, "everything", {"trainable": trainable, **(more or {})})


def write_config(bench: Bench, name: str, more: dict[str, Any]) -> Path:
    """A run at 1024 px; in a dry run on 64 px, by one worker."""
    source = bench.folder / "images"
    source.mkdir(exist_ok=True)
    side = 64 if bench.dry else 1024
    trains_text = "trainable" in more
    config: dict[str, Any] = {
        "run": {"dir": str(bench.folder / "run")},
        "model": {"path": str(bench.model), "tokenizer": str(bench.tokenizer)},
        "data": {
            "sources": [{"path": str(source)}],
            "prepared": str(bench.folder / "prepared"),
            "cache_text": not trains_text,
            "buckets": {"resolution": side, "min_px": side, "max_px": side},
        },
        "train": {"steps": 1, "precision": "bf16" if bf16_works(bench) else "fp16"},
        "optimizer": {"lr": 1e-6},
    } | more
    if trains_text:
        config["captions"] = {"max_tokens": 225}
    else:
        config["model"]["text_encoder_precision"] = "bf16"
    if bench.device == "cpu":
        config["launch"] = {"workers": 1}
    path = bench.folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def bf16_works(bench: Bench) -> bool:
    """Whether the device has bf16."""
    import torch

    return bench.device == "cpu" or torch.cuda.get_device_capability()[0] >= 8


# Of gpu_proof.py, in the order in which they run.
FULL_SIZE_TASKS = (
    "unet-1",
    "unet-2",
    "unet-4",
    "steady-loop",
    "save",
    "everything",
    "8bit-compiled",
    "8bit-plain",
    "channels-last-off",
    "compile",
    "fsdp2",
)
# By name, in the order in which they run.
SECTIONS = {
    "environment": environment,
    "tests": tests,
    "exactness": exactness,
    "bench": strategies,
    "variants": variants,
    "activations": activations,
    "attention": attention,
    "tf32": tf32,
    "optimizer": optimizer,
    "full-size": full_size,
}


if __name__ == "__main__":
    main()

"""Everything that needs a GPU, measured and added to docs/benchmarks.md; run it by benchmarks/gpu.sh.

What fails is told in its row, and the rest goes on. Weights are random, of SDXL's own size, unless --model is given.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- gpu rows: begin -->", "<!-- gpu rows: end -->"
NOT_MEASURED = "not measured: no GPU here"
GIB = 2**30


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
    arguments = parser.parse_args()

    import torch

    has_gpu = torch.cuda.is_available()
    if not has_gpu and not arguments.dry:
        sys.exit(f"{NOT_MEASURED}; `benchmarks/gpu.sh --dry` tries the commands out on a tiny model")
    docs = arguments.docs or (None if arguments.dry else ROOT / "docs" / "benchmarks.md")
    card = torch.cuda.get_device_name(0) if has_gpu else "CPU, dry run"
    cards = f"{torch.cuda.device_count()} x {card}" if has_gpu else card
    failed = False
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=arguments.dir) as temporary:
        bench = prepared(Path(temporary), arguments, "cuda" if has_gpu else "cpu")
        for name in arguments.only:
            print(f"== {name}", file=sys.stderr, flush=True)
            try:
                for row in SECTIONS[name](bench):
                    tell(docs, cards, *row)
            except Exception as error:
                failed = True
                tell(docs, cards, name, failure(error))
    sys.exit(1 if failed else 0)


def prepared(folder: Path, arguments: argparse.Namespace, device: str) -> Bench:
    """Make the model and its tokenizer."""
    from trainer.model_files.clip_tokenizer import write_clip_tokenizer
    from trainer.tiny.tiny_model import write_tiny_model

    tokenizer, model = folder / "tokenizer", arguments.model
    write_clip_tokenizer(tokenizer, "<|endoftext|>")
    if arguments.dry:
        model = folder / "tiny"
        write_tiny_model(model)
    elif model is None:
        model = folder / "random.safetensors"
        run([sys.executable, ROOT / "benchmarks" / "random_model.py", "--out", model])
    steps, batch_sizes = (2, "1") if arguments.dry else (arguments.steps, arguments.batch_sizes)
    return Bench(folder, arguments.dry, model, tokenizer, batch_sizes, steps, device)


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


def label(row: dict[str, Any]) -> str:
    """Which way to train."""
    return f"{row['workers']} x {row['strategy']}, batch {row['batch_size']}{', compiled' * row['compiled']}"


def told(row: dict[str, Any], precision: str) -> str:
    """A row's figures in a line."""
    height, width = row["bucket"]
    parts = [f"{row['images_per_s']:.2f} img/s at {width} x {height} px, {precision}; {row['step_s']:.3f} s a step"]
    parts[0] += f" ({', '.join(f'{phase} {seconds:.3f}' for phase, seconds in row['split'].items())}"
    exposed = "not measured" if row["exposed_s"] is None else f"{row['exposed_s']:.3f}"
    parts[0] += f", communication exposed {exposed})"
    parts.append("MFU " + (f"{row['mfu']:.1%}" if row["mfu"] else "unknown"))
    if row["measured_bytes"] is None:
        parts.append(f"GPU memory {NOT_MEASURED}")
    else:
        planned = f"{row['planned_bytes'] / GIB:.2f}" if row["planned_bytes"] else "nothing"
        measured, reserved = row["measured_bytes"] / GIB, row["reserved_bytes"] / GIB
        parts.append(f"tensors {measured:.2f} GiB, planned {planned}, reserved {reserved:.2f}")
    return "; ".join([*parts, f"{row['recomputed']} blocks recomputed", *row["notes"]])


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
    for options, label in (([], "not compiled"), (["--compiled"], "compiled")):
        for row in table_rows(lines_of([sys.executable, script, "--device", "cuda", *options])):
            told = f"{row['M weights/s']} million weights/s, {row['bytes/weight']} bytes a weight"
            yield f"optimizer: {row['moments']}, {row['weights']}, {label}", f"{told}, {row['extra MB']} MB beside"


def full_size(bench: Bench) -> Iterator[tuple[str, str]]:
    """Photographs from the file to the export, with 20 training steps, on one card."""
    if bench.dry:
        yield "full size: inspect, prepare, 20 steps, export", "left out in a dry run; benchmarks/full_size.py"
        return
    command = [sys.executable, ROOT / "benchmarks" / "full_size.py", "--dir", bench.folder / "full", "--steps", "20"]
    for row in table_rows(lines_of(command)):
        yield f"full size: {row['stage']}", f"{row['wall']}, host RSS {row['peak RSS']}"


def everything(bench: Bench) -> Path:
    """The UNet and both text encoders, 225 tokens."""
    part = {"train": True}
    return write_config(bench, "everything", {"trainable": {"text_encoder_1": part, "text_encoder_2": part}})


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


def cell(text: str) -> str:
    """Text that stays within its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def failure(error: Exception) -> str:
    """In a line, why a section ended before its time."""
    told = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}{': ' + told[-1] if told else ''}"


def tell(docs: Path | None, cards: str, what: str, measured: str) -> None:
    """Print a row, and add it to the document at once: what comes after it may fail."""
    line = f"| {date.today()} | {cards} | {cell(what)} | {cell(measured)} |"
    print(line, flush=True)
    if docs:
        add_row(docs, line)


def add_row(docs: Path, line: str) -> None:
    """Put the line before the end marker; the row that says that nothing was measured goes."""
    text = docs.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    rows, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{docs}: the lines {BEGIN} and {END} are missing")
    kept = [row for row in rows.splitlines() if row and not row.startswith(f"| - | - | everything | {NOT_MEASURED}")]
    docs.write_text(f"{before}{begin}\n" + "\n".join([*kept, line]) + f"\n{end}{after}", encoding="utf-8")


def product(*arguments: object) -> list[str]:
    """A command of sdxl-train."""
    return [sys.executable, "-m", "trainer", *map(str, arguments)]


def script_rows(script: str, *arguments: str) -> Iterator[tuple[str, str]]:
    """The rows of a benchmark beside this one, which prints each as JSON."""
    for line in lines_of([sys.executable, ROOT / "benchmarks" / script, *arguments]):
        what, measured = json.loads(line)
        yield what, measured


def table_rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of a Markdown table, by the names of its columns."""
    heads: list[str] | None = None
    for line in lines:
        if not line.startswith("|"):
            continue
        cells = [text.strip() for text in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if heads is None:
            heads = cells
        elif cells[0].strip("-"):
            yield dict(zip(heads, cells, strict=True))


def run(command: Sequence[object]) -> str:
    """Its standard output."""
    return "\n".join(lines_of(command)).strip()


def lines_of(command: Sequence[object]) -> Iterator[str]:
    """The lines of its standard output as they come.

    Raises:
        RuntimeError: it failed, after its last line.
    """
    words, environment = list(map(str, command)), {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield line.rstrip("\n")
    if process.returncode:
        raise RuntimeError(f"{' '.join(words[:3])} ended with exit code {process.returncode}")


# By name, in the order in which they run.
SECTIONS = {
    "environment": environment,
    "tests": tests,
    "exactness": exactness,
    "bench": strategies,
    "variants": variants,
    "attention": attention,
    "tf32": tf32,
    "optimizer": optimizer,
    "full-size": full_size,
}


if __name__ == "__main__":
    main()

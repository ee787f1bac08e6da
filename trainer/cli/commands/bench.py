"""`sdxl-train bench CONFIG.yaml`: how fast each way to train is on this machine, and how much memory it takes."""

import argparse
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import product
from pathlib import Path

from trainer.cli.arguments import add_config_arguments, read_run
from trainer.cli.start_workers import start_workers
from trainer.config.schema import Config
from trainer.data.prepare.stages import is_current
from trainer.errors import UserError
from trainer.measure.bench_report import BENCH_FILE, BenchReport, BenchRow, row_from_json
from trainer.model_files.run_model import RunModel
from trainer.parallel.environment import choose_workers, detect_gpus, joined_environment
from trainer.parallel.failure import first_cause, read_failure
from trainer.train.workers.prepare_worker import prepare_settings

STRATEGIES = ("ddp", "zero2", "zero3")
_RESULT = "result.json"


def main(argv: Sequence[str]) -> int:
    """Speed, split of a step, MFU and memory by strategy and batch size, on synthetic batches of the largest bucket.

    Each combination runs in workers of its own, as training would; one that runs out of memory ends alone.
    """
    parser = argparse.ArgumentParser(
        prog="sdxl-train bench",
        description=main.__doc__,
        epilog="example: sdxl-train bench configs/4x3090.yaml --batch-sizes 1,2,4 --strategies zero2,zero3",
    )
    add_config_arguments(parser)
    parser.add_argument("--steps", type=_count, default=10, help="optimizer steps that are measured (default: 10)")
    parser.add_argument("--warmup", type=_count, default=3, help="steps before them (default: 3)")
    parser.add_argument("--batch-sizes", type=_counts, help="images in a pass of one worker (default: 1,2,4)")
    parser.add_argument("--strategies", type=_strategies, help="of several workers (default: ddp,zero2,zero3)")
    parser.add_argument("--compile", action="store_true", help="each combination with `train.compile: blocks` as well")
    parser.add_argument("--out", type=Path, help=f"the JSON file (default: {BENCH_FILE} in run.dir)")
    arguments = parser.parse_intermixed_args(argv)
    config, model = read_run(arguments.config, arguments.overrides)
    if joined_environment(os.environ):
        raise UserError("bench starts its own workers: run it without torchrun or srun")
    gpus = detect_gpus()
    workers, on_gpus = choose_workers(config.launch.workers, gpus)
    if workers == 1 and arguments.strategies:
        raise UserError("--strategies: one worker shares its model with nobody; leave it out")
    ways = list(_ways(config, arguments, workers))
    out = arguments.out or config.run.dir / BENCH_FILE
    report = BenchReport(
        device=_card_name(gpus[0]) if on_gpus else f"CPU {platform.machine()}",
        precision=config.train.precision,
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        versions={name: version(name) for name in ("torch", "diffusers", "transformers")},
    )
    steps = f"{arguments.warmup} + {arguments.steps} steps"
    print(f"{len(ways)} ways to train with {workers} workers on {report.device}, {steps} each")
    for number, way in enumerate(ways, 1):
        print(f"{number}/{len(ways)}: {_label(way, workers)}", flush=True)
        row, stopped = _run(way, model, config.run.dir / "bench", workers, arguments)
        if stopped:
            return stopped
        report = replace(report, rows=(*report.rows, row))
        report.write(out)
        print(f"  {row.error or f'{row.images_per_s:.2f} images a second'}", flush=True)
    print()
    for line in report.describe():
        print(line)
    print(f"written: {out}")
    return 0 if report.best else 1


def _ways(config: Config, arguments: argparse.Namespace, workers: int) -> Iterator[Config]:
    strategies = (arguments.strategies or STRATEGIES) if workers > 1 else ("auto",)
    batch_sizes = arguments.batch_sizes or (1, 2, 4)
    compiles = ("off", "blocks") if arguments.compile else (config.train.compile,)
    for strategy, batch_size, compiled in product(strategies, batch_sizes, compiles):
        train = config.train.model_copy(update={"batch_size_per_gpu": batch_size, "compile": compiled})
        memory = config.memory.model_copy(update={"strategy": strategy})
        yield config.model_copy(update={"train": train, "memory": memory})


def _run(
    way: Config, model: RunModel, folder: Path, workers: int, arguments: argparse.Namespace
) -> tuple[BenchRow, int]:
    """The row of one way, and 128 + signal if a person stopped it."""
    shutil.rmtree(folder, ignore_errors=True)
    # Nothing of the run itself is touched.
    way = way.model_copy(update={"run": way.run.model_copy(update={"dir": folder})})
    options = {
        "steps": arguments.steps,
        "warmup": arguments.warmup,
        "prepared": is_current(prepare_settings(way, model)),
        "result": str(folder / _RESULT),
    }
    code = start_workers("bench", way, folder, options, stop_notice="ending")
    if code == 0:
        row = row_from_json(json.loads((folder / _RESULT).read_text(encoding="utf-8")))
        shutil.rmtree(folder, ignore_errors=True)
        return row, 0
    if code > 128:
        return _failed(way, workers, "stopped"), code
    return _failed(way, workers, _reason(folder / "logs", workers)), 0


def _reason(logs: Path, workers: int) -> str:
    """In a line, why the workers failed."""
    failures = [failure for rank in range(workers) if (failure := read_failure(logs, rank))]
    cause = first_cause(failures)
    if cause is None:
        return "ended without a word: probably out of the host's memory"
    if cause.kind == "memory":
        return f"out of memory: {cause.text.splitlines()[-1]}"
    return f"failed: {cause.text.splitlines()[-1]}"


def _failed(way: Config, workers: int, error: str) -> BenchRow:
    return BenchRow(
        strategy=way.memory.strategy if workers > 1 else "single",
        batch_size=way.train.batch_size_per_gpu,
        compiled=way.train.compile == "blocks",
        workers=workers,
        accumulation=0,
        bucket=(0, 0),
        error=error,
    )


def _label(way: Config, workers: int) -> str:
    row = _failed(way, workers, "")
    return row.label


def _card_name(listed: str) -> str:
    """`NVIDIA GeForce RTX 3090` of nvidia-smi's `GPU 0: NVIDIA GeForce RTX 3090 (UUID: GPU-...)`."""
    return listed.partition(": ")[2].partition(" (UUID")[0] or listed


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _strategies(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for name in chosen:
        if name not in STRATEGIES:
            raise argparse.ArgumentTypeError(f"{name}: must be of {', '.join(STRATEGIES)}")
    return chosen

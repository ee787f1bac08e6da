"""`sdxl-train bench CONFIG.yaml`: how fast each way to train is on this machine, and how much memory it takes."""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from trainer.cli.arguments import add_config_arguments, read_run
from trainer.cli.benches.compare_optimizers import compare_optimizers, kinds_of
from trainer.cli.benches.way_workers import Bench, count, run_way
from trainer.config.schema import Config
from trainer.data.prepare.stages import is_current
from trainer.errors import UserError
from trainer.measure.bench_report import BENCH_FILE, BenchReport, BenchRow, row_from_json
from trainer.measure.optimizer_bench import OPTIMIZERS_FILE
from trainer.model_files.run_model import RunModel
from trainer.train.workers.prepare_worker import prepare_settings

STRATEGIES = ("ddp", "zero2", "zero3")


def main(argv: Sequence[str]) -> int:
    """Speed, split of a step, MFU and memory by strategy and batch size, on synthetic batches of the largest bucket.

    Each combination runs in workers of its own, as training would; one that runs out of memory ends alone.
    """
    parser = argparse.ArgumentParser(
        prog="sdxl-train bench",
        description=main.__doc__,
        epilog="examples: sdxl-train bench configs/4x3090.yaml --batch-sizes 1,2,4 --strategies zero2,zero3; "
        "sdxl-train bench configs/4x3090.yaml --optimizers all",
    )
    add_config_arguments(parser)
    parser.add_argument("--steps", type=count, default=10, help="optimizer steps that are measured (default: 10)")
    parser.add_argument("--warmup", type=count, default=3, help="steps before them (default: 3)")
    parser.add_argument("--batch-sizes", type=_counts, help="images in a pass of one worker (default: 1,2,4)")
    parser.add_argument("--strategies", type=_strategies, help="of several workers (default: ddp,zero2,zero3)")
    parser.add_argument(
        "--bucket-sizes", type=_sizes, metavar="MIB,MIB", help="of ddp: `exchange.bucket_mib` (default: the run's)"
    )
    parser.add_argument("--compile", action="store_true", help="each combination with `train.compile: blocks` as well")
    parser.add_argument(
        "--optimizers",
        type=kinds_of,
        metavar="KIND,KIND|all",
        help="compare kinds of optimizers instead, in the run's own strategy and batch size",
    )
    files = f"{BENCH_FILE}, or {OPTIMIZERS_FILE}, in run.dir"
    parser.add_argument("--out", type=Path, help=f"the JSON file (default: {files})")
    arguments = parser.parse_intermixed_args(argv)
    ways = (arguments.batch_sizes, arguments.strategies, arguments.bucket_sizes, arguments.compile)
    if arguments.optimizers and any(ways):
        raise UserError(
            "--optimizers: measures the run's own way to train; leave out --batch-sizes, --strategies, --bucket-sizes "
            "and --compile (train.batch_size_per_gpu, memory.strategy, exchange.bucket_mib and train.compile say what "
            "it is)"
        )
    if arguments.bucket_sizes and "ddp" not in (arguments.strategies or STRATEGIES):
        raise UserError("--bucket-sizes: belongs to `ddp`, which is not among --strategies")
    config, model = read_run(arguments.config, arguments.overrides)
    if arguments.optimizers:
        return compare_optimizers(config, model, arguments.optimizers, arguments.steps, arguments.warmup, arguments.out)
    return _compare_ways(config, model, arguments)


def _compare_ways(config: Config, model: RunModel, arguments: argparse.Namespace) -> int:
    if arguments.bucket_sizes and config.exchange.averages_weights:
        raise UserError("--bucket-sizes: with exchange.average_every no gradients travel; leave it out")
    bench = Bench.here(config)
    for option, given in (("--strategies", arguments.strategies), ("--bucket-sizes", arguments.bucket_sizes)):
        if bench.workers == 1 and given:
            raise UserError(f"{option}: one worker shares its model with nobody; leave it out")
    ways = list(_ways(config, arguments, bench.workers))
    out = arguments.out or config.run.dir / BENCH_FILE
    report = BenchReport(bench.device, config.train.precision, bench.time, bench.versions)
    steps = f"{arguments.warmup} + {arguments.steps} steps"
    print(f"{len(ways)} ways to train with {bench.workers} workers on {report.device}, {steps} each")
    for number, way in enumerate(ways, 1):
        print(f"{number}/{len(ways)}: {_failed(way, bench.workers, '').label}", flush=True)
        options = {
            "steps": arguments.steps,
            "warmup": arguments.warmup,
            "prepared": is_current(prepare_settings(way, model)),
        }
        outcome = run_way("bench", way, bench.workers, options)
        if outcome.stopped:
            return outcome.stopped
        row = row_from_json(outcome.result) if outcome.result else _failed(way, bench.workers, outcome.error)
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
        own = config.exchange.bucket_mib if strategy == "ddp" else "auto"
        for bucket_mib in (arguments.bucket_sizes if strategy == "ddp" else None) or (own,):
            exchange = config.exchange.model_copy(update={"bucket_mib": bucket_mib})
            yield config.model_copy(update={"train": train, "memory": memory, "exchange": exchange})


def _failed(way: Config, workers: int, error: str) -> BenchRow:
    return BenchRow(
        strategy=way.memory.strategy if workers > 1 else "single",
        batch_size=way.train.batch_size_per_gpu,
        compiled=way.train.compile == "blocks",
        workers=workers,
        accumulation=0,
        bucket=(0, 0),
        bucket_mib=way.exchange.wished_bucket_mib,
        error=error,
    )


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(count, text.split(",")))


def _sizes(text: str) -> tuple[float, ...]:
    try:
        sizes = tuple(map(float, text.split(",")))
    except ValueError:
        sizes = ()
    if not sizes or not all(0.01 <= size <= 65536 for size in sizes):  # as `exchange.bucket_mib`
        raise argparse.ArgumentTypeError(f"{text}: must be numbers of MiB from 0.01 to 65536, such as 16,64")
    return sizes


def _strategies(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    for name in chosen:
        if name not in STRATEGIES:
            raise argparse.ArgumentTypeError(f"{name}: must be of {', '.join(STRATEGIES)}")
    return chosen

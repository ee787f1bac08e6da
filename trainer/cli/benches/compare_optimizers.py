"""`sdxl-train bench CONFIG.yaml --optimizers ...`: what each kind of optimizer costs this run."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.cli.benches.way_workers import Bench, run_way
from trainer.config.rules import broken_rules
from trainer.config.schema import Config
from trainer.config.sections.optimizer_config import FINDS_LR, KIND_DEFAULTS, KINDS, OptimizerConfig, OptimizerKind
from trainer.data.prepare.stages import is_current
from trainer.measure.optimizer_bench import OPTIMIZERS_FILE, OptimizerReport, OptimizerRow, optimizer_row
from trainer.model_files.run_model import RunModel
from trainer.train.workers.prepare_worker import prepare_settings

_ALL = "all"
_LR = 1e-5  # where the run's own kind finds one


def kinds_of(text: str) -> tuple[OptimizerKind, ...]:
    """An argument that names kinds of optimizers, or all of them."""
    if text == _ALL:
        return KINDS
    known: dict[str, OptimizerKind] = {kind: kind for kind in KINDS}
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name}: must be `{_ALL}`, or of {', '.join(KINDS)}")
    return tuple(known[name] for name in names)


def compare_optimizers(
    config: Config, model: RunModel, kinds: Sequence[OptimizerKind], steps: int, warmup: int, out: Path | None
) -> int:
    """Measure the kinds one by one, print the table, and keep it as JSON; returns the command's exit code."""
    bench = Bench.here(config)
    out = out or config.run.dir / OPTIMIZERS_FILE
    report = OptimizerReport(
        device=bench.device,
        precision=config.train.precision,
        strategy=config.memory.strategy,
        workers=bench.workers,
        batch_size=config.train.batch_size_per_gpu,
        own_kind=config.optimizer.kind,
        time=bench.time,
        versions=bench.versions,
    )
    options = {"steps": steps, "warmup": warmup, "prepared": is_current(prepare_settings(config, model))}
    print(f"{len(kinds)} optimizers with {bench.workers} workers on {bench.device}, {warmup} + {steps} steps each")
    for number, kind in enumerate(kinds, 1):
        print(f"{number}/{len(kinds)}: {kind}", flush=True)
        way = with_kind(config, kind)
        if problems := broken_rules(way):
            row = OptimizerRow(kind, refused=True, error=problems[0].text)
        else:
            outcome = run_way("bench_optimizer", way, bench.workers, options)
            if outcome.stopped:
                return outcome.stopped
            row = optimizer_row(outcome.result) if outcome.result else OptimizerRow(kind, error=outcome.error)
        report = report.with_row(row)
        report.write(out)
        print(f"  {row.summary()}", flush=True)
    print()
    for line in report.describe():
        print(line)
    print(f"written: {out}")
    return 0 if report.measured else 1


def with_kind(config: Config, kind: OptimizerKind) -> Config:
    """The run with another optimizer: its own numbers are the kind's, for those of one kind are not another's."""
    own = config.optimizer
    if kind == own.kind:
        return config
    lr = _LR if own.kind in FINDS_LR else own.lr
    is_compiled = kind == "adamw_8bit" or (kind == "adamw" and config.train.precision.startswith("bf16_"))
    section = OptimizerConfig(
        kind=kind,
        lr=1.0 if kind in FINDS_LR else lr,
        decay_norms_and_biases=own.decay_norms_and_biases or not KIND_DEFAULTS[kind]["weight_decay"],
        compile=own.compile if is_compiled else "auto",
    )
    return config.model_copy(update={"optimizer": section})

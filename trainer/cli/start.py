"""From a checked configuration to running workers: launched here, or joined where another launcher did it."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from trainer.config.load import to_yaml
from trainer.config.schema import Config
from trainer.dist.environment import choose_workers, detect_gpus, joined_environment
from trainer.dist.launch import run_workers
from trainer.errors import UserError

RESOLVED_CONFIG = "config.resolved.yaml"


def start_workers(task: str, config: Config, out_dir: Path, options: Mapping[str, object]) -> int:
    """Run a task of `trainer.cli.worker` on this host's workers; returns the command's exit code.

    Args:
        out_dir: where the resolved configuration and the workers' logs go.
        options: JSON-able arguments of the task.
    """
    workers, gpu = choose_workers(config.launch.workers, detect_gpus())
    out_dir.mkdir(parents=True, exist_ok=True)
    resolved = out_dir / RESOLVED_CONFIG
    resolved.write_text(to_yaml(config), encoding="utf-8")
    result = run_workers(
        [sys.executable, "-m", "trainer.cli.worker", task, str(resolved), json.dumps(options)],
        workers=workers,
        log_dir=out_dir / "logs",
        env=os.environ,
        threads=config.launch.threads_per_worker,
        gpu=gpu,
    )
    if result.failure is not None:
        prefix = "sdxl-train: " if result.failure.kind == "user" else "sdxl-train: training stopped: "
        for line in result.failure.message().splitlines() if result.failure.kind == "user" else [result.failure.message()]:
            print(f"{prefix}{line}", file=sys.stderr)
    return result.exit_code


def worker_count(config: Config) -> int:
    """Workers of the whole run: those of torchrun or SLURM where they started us, else this host's."""
    joined = joined_environment(os.environ)
    return int(joined["WORLD_SIZE"]) if joined else choose_workers(config.launch.workers, detect_gpus())[0]

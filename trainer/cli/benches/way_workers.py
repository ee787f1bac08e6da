"""One way to train, measured in workers of its own: what they found, or in a line why they failed."""

import argparse
import json
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.cli.start_workers import start_workers
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.parallel.environment import choose_workers, detect_gpus, joined_environment
from trainer.parallel.failure import first_cause, read_failure

_RESULT = "result.json"


@dataclass(frozen=True)
class Bench:
    """Where it is measured.

    Attributes:
        workers: of each way.
        device: the cards' name, or the CPU.
        time: when the bench began, as ISO 8601.
        versions: of torch and others.
    """

    workers: int
    device: str
    time: str
    versions: dict[str, str]

    @staticmethod
    def here(config: Config) -> "Bench":
        """On this host's cards.

        Raises:
            UserError: a launcher has started this process as a worker.
        """
        if joined_environment(os.environ):
            raise UserError("bench starts its own workers: run it without torchrun or srun")
        gpus = detect_gpus()
        workers, on_gpus = choose_workers(config.launch.workers, gpus)
        return Bench(
            workers=workers,
            device=_card_name(gpus[0]) if on_gpus else f"CPU {platform.machine()}",
            time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            versions={name: version(name) for name in ("torch", "diffusers", "transformers")},
        )


@dataclass(frozen=True)
class Outcome:
    """What came of a way.

    Attributes:
        result: the JSON that rank 0 wrote; None: there is none.
        error: why not.
        stopped: 128 + signal if a person stopped it, else 0.
    """

    result: dict[str, Any] | None
    error: str = ""
    stopped: int = 0


def run_way(task: str, way: Config, workers: int, options: Mapping[str, object]) -> Outcome:
    """Run a task of `trainer.cli.tasks` that writes its finding to `options["result"]`.

    Nothing of the run itself is touched: the workers write below `bench` in its directory, which is removed after.
    """
    folder = way.run.dir / "bench"
    shutil.rmtree(folder, ignore_errors=True)
    way = way.model_copy(update={"run": way.run.model_copy(update={"dir": folder})})
    found = folder / _RESULT
    code = start_workers(task, way, folder, {**options, "result": str(found)}, stop_notice="ending")
    if code == 0:
        result = json.loads(found.read_text(encoding="utf-8"))
        shutil.rmtree(folder, ignore_errors=True)
        return Outcome(result)
    if code > 128:
        return Outcome(None, "stopped", code)
    return Outcome(None, _reason(folder / "logs", workers))


def _reason(logs: Path, workers: int) -> str:
    """In a line, why the workers failed."""
    failures = [failure for rank in range(workers) if (failure := read_failure(logs, rank))]
    cause = first_cause(failures)
    if cause is None:
        return "ended without a word: probably out of the host's memory"
    if cause.kind == "memory":
        return f"out of memory: {cause.text.splitlines()[-1]}"
    return f"failed: {cause.text.splitlines()[-1]}"


def _card_name(listed: str) -> str:
    """`NVIDIA GeForce RTX 3090` of nvidia-smi's `GPU 0: NVIDIA GeForce RTX 3090 (UUID: GPU-...)`."""
    return listed.partition(": ")[2].partition(" (UUID")[0] or listed


def count(text: str) -> int:
    """An argument that is a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number above 0")
    return int(text)

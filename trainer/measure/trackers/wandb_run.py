"""Weights & Biases: one run there for a run here, online, or as files that `wandb sync` uploads."""

import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trainer.measure.trackers.tracked_run import Mark, Record, TrackedRun, Tracker, values_of, write_mark

WANDB_FOLDER = "wandb"


class WandbRun:
    """A run of the library `wandb`, with the step as the axis of all its curves."""

    def __init__(self, run: Any) -> None:
        self._run = run
        self.id: str = run.id
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def add(self, records: Sequence[Record]) -> None:
        """Hand them to the library, which sends them on in a process of its own."""
        for record in records:
            told = {"_timestamp": record["time"]} if "time" in record else {}
            self._run.log({"step": record["step"], **values_of(record), **told})

    def close(self) -> None:
        """Wait until all is sent, or written."""
        self._run.finish()


def open_wandb(run: TrackedRun, mark: Mark) -> tuple[Tracker, Mark]:
    """The run of the mark's id, new or gone on with.

    Steps cannot be taken back there. Where some are to be replaced, the run of the same id begins anew, which
    overwrites it, and gets all records once more. Files of offline mode hold the whole run each time: those of earlier
    starts that were not uploaded are removed.
    """
    import wandb  # pyright: ignore[reportMissingImports]

    mode = run.options.get("mode", "auto")
    mode = os.environ.get("WANDB_MODE", "online") if mode == "auto" else mode
    mark = replace(mark, id=mark.id or secrets.token_hex(4))
    goes_on = mode == "online" and mark.records > 0 and not mark.replaces
    if not goes_on:  # known before there is a run of it: who is ended meanwhile leaves none that nobody knows
        write_mark(run.run_dir, run.kind, Mark(id=mark.id))
    if mode == "offline":
        _remove_earlier(run.run_dir / WANDB_FOLDER, mark.id)
    opened = wandb.init(
        dir=str(run.run_dir),
        id=mark.id,
        name=run.name,
        project=run.options.get("project"),
        entity=run.options.get("entity"),
        mode=mode,  # pyright: ignore[reportArgumentType] - of the environment, which wandb itself would check
        resume="allow" if goes_on else None,
        config=dict(run.settings),
        save_code=False,
        settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=60, x_disable_stats=True),
    )
    return WandbRun(opened), mark if goes_on else Mark(id=mark.id)


def _remove_earlier(folder: Path, run_id: str) -> None:
    for earlier in folder.glob(f"offline-run-*-{run_id}"):
        if not any(earlier.glob("*.synced")):
            shutil.rmtree(earlier, ignore_errors=True)

"""The records of a run: `metrics.jsonl` and, mirrored from it, TensorBoard events."""

import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all workers."""

    step: int  # optimizer steps done, this one included
    epoch: float  # passes over the data done
    loss: float  # weighted mean over the step's images
    lr: float
    grad_norm: float  # global L2 norm before clipping
    images: int  # images of this step, padding not counted
    images_seen: int  # images of all steps so far
    data_wait_s: float  # part of step_s spent waiting for the batch
    step_s: float  # this step alone, without checkpoints, validation and samples
    block_norms: Mapping[str, float] = field(default_factory=dict)  # gradient norms by block, before clipping
    bad_rows: int = 0  # rows of all steps so far that could not be read


class MetricsWriter:
    """Appends records to `metrics.jsonl`, one flushed JSON line each, and mirrors them to TensorBoard.

    A record is `kind`, `step`, its values, `time` (seconds since 1970). A value that is not finite is
    written as null, since JSON has no word for it. For rank 0 only.

    Args:
        run_dir: the run directory; made if it is missing.
        resume_step: step of the checkpoint that the run goes on from: the records after it are removed,
            for those steps are done again. None: a fresh start, all records are removed.
    """

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        # Imported here since it takes 0.15 s and only rank 0 writes.
        from torch.utils.tensorboard.writer import SummaryWriter

        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        last_step = -1 if resume_step is None else resume_step
        remove_records_after(path, last_step)
        self._file = path.open("a", encoding="utf-8")
        self._events = SummaryWriter(str(run_dir / TENSORBOARD_DIR), purge_step=last_step + 1, flush_secs=10)

    def step(self, metrics: StepMetrics) -> None:
        """Writes a record of kind `train`: epoch, loss, lr, grad_norm, images_per_s (of this step alone),
        data_wait_s, step_s, images_seen."""
        self.write(
            "train",
            metrics.step,
            {
                "epoch": metrics.epoch,
                "loss": metrics.loss,
                "lr": metrics.lr,
                "grad_norm": metrics.grad_norm,
                "images_per_s": metrics.images / metrics.step_s if metrics.step_s > 0 else math.nan,
                "data_wait_s": metrics.data_wait_s,
                "step_s": metrics.step_s,
                "images_seen": metrics.images_seen,
            }
            | {f"grad_norm/{block}": norm for block, norm in metrics.block_norms.items()},
        )

    def validation(self, step: int, loss: float, loss_at_timestep: Mapping[int, float], average: str = "") -> None:
        """Writes a record of kind `validation`: loss, and the loss at each timestep as loss_t100, ...

        Args:
            average: of the weights, that was scored in their place; the kind is `validation_NAME` then.
        """
        kind = f"validation_{average}" if average else "validation"
        self.write(kind, step, {"loss": loss, **{f"loss_t{t}": x for t, x in loss_at_timestep.items()}})

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Writes a record of any kind; its TensorBoard tags are `kind/key`."""
        record: dict[str, Any] = {"kind": kind, "step": step}
        record |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        record["time"] = round(time.time(), 3)
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for key, value in values.items():
            self._events.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        """Flushes and closes both."""
        self._file.close()
        self._events.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records of a run, in the order they were written.

    A line that is no record (the last one of a run that was killed) is left out, with a warning. A run
    without the file has no records.
    """
    lines = list(_records(run_dir / METRICS_FILE))
    records = [record for record in lines if record is not None]
    if len(records) < len(lines):
        _log.warning("%s: %d unreadable line(s) left out", run_dir / METRICS_FILE, len(lines) - len(records))
    return records


def _records(path: Path) -> Iterator[dict[str, Any] | None]:
    """The records of a file; None for each line that is none."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            whole = line.endswith("\n") and isinstance(record, dict) and isinstance(record.get("step"), int)
            yield record if whole else None


def remove_records_after(path: Path, last_step: int) -> None:
    """Replaces a file of JSON records by one without those of later steps and unreadable lines; at once, or not at
    all."""
    if all(record is not None and record["step"] <= last_step for record in _records(path)):
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for record in _records(path):
            if record is not None and record["step"] <= last_step:
                file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)

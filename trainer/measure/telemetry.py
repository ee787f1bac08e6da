"""The records of a run: `metrics.jsonl` and, mirrored from it, TensorBoard events and other trackers."""

import contextlib
import json
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from trainer.measure.timestep_losses import KIND as BY_TIMESTEP
from trainer.measure.timestep_losses import TimestepLosses
from trainer.measure.trackers.beside import TrackerBeside, end_all
from trainer.measure.trackers.tracked_run import TrackedRun

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"

_log = logging.getLogger(__name__)
_PAUSE = 50  # records, after one that could not be written


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
    part_lrs: Mapping[str, float] = field(default_factory=dict)  # learning rates by part of the model
    found_lr: float | None = None  # `d`, of optimizers that find a learning rate: they take `lr` times it

    @property
    def effective_lr(self) -> float:
        """What weights are changed at."""
        return self.lr if self.found_lr is None else self.lr * self.found_lr


class MetricsWriter:
    """Appends records to `metrics.jsonl`, one flushed JSON line each, and mirrors them to TensorBoard.

    A record is `kind`, `step`, its values, `time` (seconds since 1970). A value that is not finite is
    written as null, since JSON has no word for it. For rank 0 only.

    Args:
        run_dir: the run directory; made if it is missing.
        resume_step: step of the checkpoint that the run goes on from: the records after it are removed,
            for those steps are done again. None: a fresh start, all records are removed.
        tensorboard: whether to mirror them to TensorBoard; `trackers`: to what else, in processes beside.
    """

    def __init__(
        self,
        run_dir: Path,
        resume_step: int | None,
        *,
        tensorboard: bool = True,
        trackers: Sequence[TrackedRun] = (),
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._path = run_dir / METRICS_FILE
        last_step = -1 if resume_step is None else resume_step
        remove_records_after(self._path, last_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._has_events = tensorboard
        self._events: SummaryWriter | None = self._open_events(last_step + 1) if tensorboard else None
        self._beside = [TrackerBeside(run, METRICS_FILE, last_step) for run in trackers]
        self._lost, self._pause = Counter[str](), Counter[str]()
        self._by_timestep = TimestepLosses()

    def _open_events(self, first_step: int) -> "SummaryWriter":
        # Imported here since it takes 0.15 s and only rank 0 writes.
        from torch.utils.tensorboard.writer import SummaryWriter

        threading.excepthook = _without_broken_writers
        return SummaryWriter(str(self._path.parent / TENSORBOARD_DIR), purge_step=first_step, flush_secs=10)

    def step(self, metrics: StepMetrics) -> None:
        """Writes a record of kind `train`: epoch, loss, lr, grad_norm, images_per_s (of this step alone),
        data_wait_s, step_s, images_seen. Where several parts of the model train, `lr/PART` of each; where the
        optimizer finds a learning rate, `d` and effective_lr, which is lr times d."""
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
            | _rates(metrics)
            | {f"grad_norm/{block}": norm for block, norm in metrics.block_norms.items()},
        )
        if by_timestep := self._by_timestep.take():
            self.write(BY_TIMESTEP, metrics.step, by_timestep)

    def seen(self, by_timestep: Sequence[float]) -> None:
        """Takes in a step's sums by timestep; call it for each step. `step` writes a record of kind `train_by_timestep`
        of them whenever there are enough images."""
        self._by_timestep.add(by_timestep)

    def validation(
        self,
        step: int,
        loss: float,
        loss_at_timestep: Mapping[int, float],
        average: str = "",
        more: Mapping[str, float] | None = None,
    ) -> None:
        """Writes a record of kind `validation`: loss, and the loss at each timestep as loss_t100, ...

        Args:
            average: of the weights, that was scored in their place; the kind is `validation_NAME` then.
            more: what else the record has; no name of it begins with `loss_t`.
        """
        kind = f"validation_{average}" if average else "validation"
        losses = {"loss": loss, **{f"loss_t{t}": x for t, x in loss_at_timestep.items()}}
        self.write(kind, step, losses | dict(more or {}))

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Writes a record of any kind; its TensorBoard tags are `kind/key`."""
        record: dict[str, Any] = {"kind": kind, "step": step}
        record |= {key: value if math.isfinite(value) else None for key, value in values.items()}
        record["time"] = round(time.time(), 3)
        self._attempt(METRICS_FILE, lambda: self._append(json.dumps(record, allow_nan=False) + "\n"))
        if self._has_events:
            self._attempt(TENSORBOARD_DIR, lambda: self._add_scalars(kind, values, step))

    def _append(self, line: str) -> None:
        self._file.write(line)
        self._file.flush()

    def _add_scalars(self, kind: str, values: Mapping[str, float], step: int) -> None:
        if self._events is None:
            self._events = self._open_events(step)
        for key, value in values.items():
            self._events.add_scalar(f"{kind}/{key}", value, step)

    def _attempt(self, what: str, write: Callable[[], None]) -> None:
        """A record that cannot be written, on a full disk, is told and left out; the next one is tried again."""
        if self._pause[what] > 0:
            self._pause[what] -= 1
            self._lost[what] += 1
            return
        try:
            write()
        except Exception as error:  # TensorBoard's thread hands on whatever ended it
            self._lost[what] += 1
            self._pause[what] = _PAUSE
            _log.warning("%s: not written (%s), %d records by now; training goes on", what, error, self._lost[what])
            if what == TENSORBOARD_DIR:
                self._events = None  # its thread is dead; a new one goes on in a file of its own
            else:
                self._reopen()

    def _reopen(self) -> None:
        """What the broken file still holds would be written again and again."""
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Flushes and closes all of them; what trackers lack is waited for, a while."""
        with ExitStack() as stack:
            stack.callback(end_all, self._beside)  # when the file is whole
            stack.callback(_close, self._file)
            if self._events:
                stack.callback(_close, self._events)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _rates(metrics: StepMetrics) -> dict[str, float]:
    """What one number does not say of the learning rates."""
    found = {f"lr/{part}": lr for part, lr in metrics.part_lrs.items()} if len(metrics.part_lrs) > 1 else {}
    if metrics.found_lr is not None:
        found |= {"d": metrics.found_lr, "effective_lr": metrics.effective_lr}
    return found


def _without_broken_writers(arguments: threading.ExceptHookArgs) -> None:
    """A traceback of TensorBoard's thread says no more than the warning that its next record brings."""
    if type(arguments.thread).__name__ != "_AsyncWriterThread":
        threading.__excepthook__(arguments)


def _close(records: "IO[str] | SummaryWriter") -> None:
    try:
        records.close()
    except Exception as error:
        _log.warning("the last records are not written: %s", error)


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

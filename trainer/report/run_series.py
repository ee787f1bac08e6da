"""The numbers of a run, taken up from its records as they are written, and thinned out to what a screen can show."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from trainer.guards import Refused
from trainer.report.followed_file import FollowedFile
from trainer.report.series import Series

METRICS = "metrics.jsonl"
HOST = "host.jsonl"
_NO_SERIES = {"kind", "step", "time", "epoch", "images_seen"}
_NOT_SHOWN = "grad_norm/"  # of each block, a hundred of them
_MOST_SERIES = 500
_HUGE = 10**300  # of integers, which JSON does not bound
_HOUR = 3600
_DIGITS = 4  # of hours


class RunSeries:
    """All numbers of `metrics.jsonl`, one curve over all starts of the run, in bounded memory.

    Attributes:
        by_name: `train/loss`, `validation/loss`, `validation_ema/loss_t100`, ...
        last: the newest record of training.
        begun, ended: times of the first and the newest record, in seconds since 1970.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = FollowedFile(run_dir / METRICS)
        self._forget()

    def _forget(self) -> None:
        self.by_name: dict[str, Series] = {}
        self.last: Mapping[str, Any] = {}
        self.begun: float | None = None
        self.ended: float | None = None
        self._newest_step: dict[str, float] = {}  # by kind

    def update(self) -> None:
        """Take up what was written since. A line that is no record is left out.

        Raises:
            OSError: there is no such file.
        """
        is_anew, lines = self._file.news()
        if is_anew:
            self._forget()
        for record in json_records(lines):
            self._take(record)

    def _take(self, record: Mapping[str, Any]) -> None:
        kind, step, when = record.get("kind"), record.get("step"), record.get("time")
        if not isinstance(kind, str) or not is_number(step):
            return
        if step <= self._newest_step.get(kind, -1):
            self._forget_from(kind, step)
        self._newest_step[kind] = step
        if is_number(when):
            self.begun, self.ended = self.begun or when, when
        if kind == "train":
            self.last = record
        for name, value in record.items():
            if name not in _NO_SERIES and is_number(value) and not name.startswith(_NOT_SHOWN):
                series = _series(self.by_name, f"{kind}/{name}")
                if series is not None:
                    series.add(step, value)

    def _forget_from(self, kind: str, step: float) -> None:
        """What is done anew; where steps are trained again, nothing that came after them counts."""
        for name, series in self.by_name.items():
            if kind == "train" or name.startswith(f"{kind}/"):
                series.forget_from(step)


class HostSeries:
    """All numbers of `host.jsonl` over hours: `workers_mib.0`, `cards.0.temperature_c`, ..."""

    def __init__(self, run_dir: Path) -> None:
        self._file = FollowedFile(run_dir / HOST)
        self.by_name: dict[str, Series] = {}
        self._begun: float | None = None

    def update(self) -> None:
        """Take up what was written since; without the file there is nothing."""
        try:
            is_anew, lines = self._file.news()
        except (OSError, Refused):
            is_anew, lines = True, iter(())
        if is_anew:
            self.by_name, self._begun = {}, None
        for record in json_records(lines):
            when = record.get("time")
            if not is_number(when):
                continue
            self._begun = when if self._begun is None else self._begun
            hours = round((when - self._begun) / _HOUR, _DIGITS)
            for name, value in _flattened(record):
                series = None if name == "time" else _series(self.by_name, name)
                if series is not None:
                    series.add(hours, value)


def _series(by_name: dict[str, Series], name: str) -> Series | None:
    """The series of a name; None of one too many."""
    series = by_name.get(name)
    if series is None and len(by_name) < _MOST_SERIES:
        series = by_name[name] = Series()
    return series


def _flattened(at: object, key: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(at, dict):
        for name, inner in at.items():
            yield from _flattened(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(at, list):
        for number, inner in enumerate(at):
            yield from _flattened(inner, f"{key}.{number}")
    elif is_number(at):
        yield key, at


def json_records(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The lines that are JSON objects; others are left out."""
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it can be drawn: a finite number, and no truth value."""
    kind = type(value)
    if kind is float:
        return math.isfinite(value)
    return kind is int and -_HUGE < value < _HUGE

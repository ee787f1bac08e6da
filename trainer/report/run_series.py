"""The numbers of a run over its steps, thinned out to what a screen can show."""

from __future__ import annotations

import json
import math
from array import array
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
HOST = "host.jsonl"
POINTS = 1500
"""Of a curve: more cannot be told apart."""
_SKIPPED = {"kind", "step", "time", "epoch", "images_seen"}


@dataclass
class Series:
    """One number over the steps.

    Attributes:
        steps, values: as recorded; values that were not finite are left out.
    """

    steps: array[float] = field(default_factory=lambda: array("d"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def thinned(self, points: int = POINTS) -> dict[str, list[float]]:
        """Means, least and greatest of stretches of equal numbers of records, at their last steps."""
        count = len(self.steps)
        if count <= points:
            values = [_short(value) for value in self.values]
            return {"x": [*self.steps], "y": values}
        cuts = [count * i // points for i in range(points + 1)]
        found: dict[str, list[float]] = {"x": [], "y": [], "low": [], "high": []}
        for begin, end in pairwise(cuts):
            part = self.values[begin:end]
            found["x"].append(self.steps[end - 1])
            found["y"].append(_short(math.fsum(part) / len(part)))
            found["low"].append(_short(min(part)))
            found["high"].append(_short(max(part)))
        return found


@dataclass
class RunSeries:
    """All numbers of a run.

    Attributes:
        by_name: `train/loss`, `validation/loss`, `validation_ema/loss_t100`, `host/ram`, ...
        last: the newest record of training.
        begun, ended: times of the first and the newest record, in seconds since 1970.
    """

    by_name: dict[str, Series] = field(default_factory=lambda: defaultdict(Series))
    last: dict[str, Any] = field(default_factory=dict)
    begun: float | None = None
    ended: float | None = None


def read_series(run_dir: Path) -> RunSeries:
    """Of `metrics.jsonl`, one curve over all starts of the run; a line that is cut short is left out.

    Raises:
        OSError: there is no such file.
    """
    found = RunSeries()
    for record in _records(run_dir / METRICS):
        kind, step, when = record.get("kind"), record.get("step"), record.get("time")
        if not isinstance(kind, str) or not isinstance(step, int):
            continue
        if _is_number(when):
            found.begun, found.ended = found.begun or when, when
        if kind == "train":
            found.last = record
        for name, value in record.items():
            if name not in _SKIPPED and _is_number(value):
                series = found.by_name[f"{kind}/{name}"]
                series.steps.append(step)
                series.values.append(value)
    return found


def read_host(run_dir: Path) -> list[dict[str, Any]]:
    """The newest records of `host.jsonl`, at most a thousand; [] where there are none."""
    try:
        records = [*_records(run_dir / HOST)]
    except OSError:
        return []
    stride = max(1, len(records) // 1000)
    return records[::stride]


def _records(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                yield record


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: float) -> float:
    return float(f"{value:.6g}")

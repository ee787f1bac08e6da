"""What a page says of a run: where it stands, its curves, what happened, its samples; only what is new is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.errors import UserError, printable
from trainer.report.followed_file import FollowedList
from trainer.report.run_series import HostSeries, RunSeries, is_number
from trainer.report.run_settings import run_settings
from trainer.report.sample_images import sample_images
from trainer.report.series import POINTS, Series

_EVENTS, _SKIPPED, _BAD = "events.txt", "skipped.jsonl", "bad.jsonl"
_HOST_POINTS = 512
_SPEED_OF = 50  # steps
_GIB = 1 << 30


class FollowedRun:
    """A run directory, which may be growing.

    Raises:
        UserError: it is no run directory.
    """

    def __init__(self, run_dir: Path) -> None:
        if not run_dir.is_dir():
            raise UserError(f"{run_dir}: no such folder; give a run directory")
        self.run_dir = run_dir
        self._series, self._host = RunSeries(run_dir), HostSeries(run_dir)
        self._events = FollowedList(run_dir / _EVENTS, 400)
        self._skipped = FollowedList(run_dir / _SKIPPED, 20)
        self._bad = FollowedList(run_dir / _BAD, 20)

    def facts(self, *, in_full: bool = True, points: int = POINTS) -> dict[str, Any]:
        """What there is now, JSON-able.

        Args:
            in_full: with its samples, its machine and its events.
            points: of a curve, at most.

        Raises:
            UserError: it has no records yet.
        """
        try:
            self._series.update()
        except OSError as error:
            rule = "has no metrics.jsonl; give the directory of a run that has taken a step"
            raise UserError(f"{self.run_dir}: {rule} ({error.strerror})") from None
        settings = run_settings(self.run_dir)
        found = {
            "name": printable(self.run_dir.absolute().name),
            "place": printable(str(self.run_dir.absolute()), 4096),
            "stands": _stands(self._series, settings),
            "series": _packed(self._series.by_name, points),
            "settings": settings,
        }
        return found | (self._in_full() if in_full else {})

    def _in_full(self) -> dict[str, Any]:
        for each in (self._host, self._events, self._skipped, self._bad):
            each.update()
        return {
            "host": _packed(self._host.by_name, _HOST_POINTS),
            "events": [*self._events.newest],
            "skipped": {"count": self._skipped.count, "newest": [*self._skipped.newest]},
            "bad": {"count": self._bad.count, "newest": [*self._bad.newest]},
            "checkpoints": _checkpoints(self.run_dir),
            "samples": sample_images(self.run_dir / "samples"),
        }


def _packed(by_name: Mapping[str, Series], points: int) -> dict[str, Any]:
    """Curves by name, `x` as a number among `xs`: most of them have the same."""
    numbers: dict[tuple[float, ...], int] = {}
    curves = {}
    for name, series in sorted(by_name.items()):
        curve: dict[str, Any] = series.thinned(points)
        if curve["x"]:
            x = numbers.setdefault(tuple(curve["x"]), len(numbers))
            curves[printable(name)] = {**curve, "x": x}
    return {"xs": [[*x] for x in numbers], "curves": curves}


def _stands(series: RunSeries, settings: Mapping[str, str]) -> dict[str, Any]:
    last = {name: value for name, value in series.last.items() if is_number(value)}
    speeds = series.by_name["train/images_per_s"].newest(_SPEED_OF) if "train/images_per_s" in series.by_name else ()
    return {
        "step": last.get("step", 0),
        "steps": settings.get("train.steps"),
        "epoch": last.get("epoch"),
        "epochs": settings.get("train.epochs"),
        "images": last.get("images_seen"),
        "images_per_s": sum(speeds) / len(speeds) if len(speeds) else None,
        "begun": series.begun,
        "ended": series.ended,
    }


def _checkpoints(run_dir: Path) -> list[dict[str, Any]]:
    found = []
    for place in sorted((run_dir / "checkpoints").glob("step-????????")):
        try:
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        except OSError:
            continue
        found.append({"name": place.name, "gib": round(size / _GIB, 2)})
    return found

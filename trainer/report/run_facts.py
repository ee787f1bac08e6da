"""What a page says of a run: where it stands, what happened, its settings, its samples; plain values alone."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from trainer.config.yaml_source import YamlError, parse
from trainer.errors import UserError, printable
from trainer.report.run_series import RunSeries, read_host, read_series

_CONFIG = "config.resolved.yaml"
_EVENTS, _SKIPPED, _BAD = "events.txt", "skipped.jsonl", "bad.jsonl"
_SAMPLE_STEPS, _SAMPLE_IMAGES, _SAMPLE_PX = 24, 8, 320
_GIB = 1 << 30


def run_facts(run_dir: Path, *, with_samples: bool = True) -> dict[str, Any]:
    """Of one run, JSON-able.

    Raises:
        UserError: it is no run directory, or has no records yet.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such folder; give a run directory")
    try:
        series = read_series(run_dir)
    except OSError as error:
        rule = "has no metrics.jsonl; give the directory of a run that has taken a step"
        raise UserError(f"{run_dir}: {rule} ({error.strerror})") from None
    settings = _settings(run_dir / _CONFIG)
    return {
        "name": printable(run_dir.absolute().name),
        "place": printable(str(run_dir.absolute())),
        "stands": _stands(series, settings),
        "series": {name: each.thinned() for name, each in sorted(series.by_name.items())},
        "host": _host(read_host(run_dir)),
        "events": _tail(run_dir / _EVENTS, 400),
        "skipped": _lines(run_dir / _SKIPPED),
        "bad": _lines(run_dir / _BAD),
        "settings": settings,
        "checkpoints": _checkpoints(run_dir),
        "samples": _samples(run_dir / "samples") if with_samples else [],
    }


def differing(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Settings that are not the same in all runs: the key, and what each has."""
    keys = sorted({key for run in runs for key in run["settings"]} - {"run.dir"})
    rows = [[key, *(run["settings"].get(key, "") for run in runs)] for key in keys]
    return [row for row in rows if len({*row[1:]}) > 1]


def _stands(series: RunSeries, settings: Mapping[str, str]) -> dict[str, Any]:
    last = series.last
    speeds = series.by_name["train/images_per_s"].values[-50:] if "train/images_per_s" in series.by_name else ()
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


def _settings(path: Path) -> dict[str, str]:
    """By key such as `train.steps`, as text."""
    try:
        value = parse(path.read_text(encoding="utf-8", errors="replace")).value
    except (OSError, YamlError):
        return {}
    found: dict[str, str] = {}

    def walk(at: object, key: str) -> None:
        if isinstance(at, dict) and at:
            for name, inner in at.items():
                walk(inner, f"{key}.{name}" if key else str(name))
        elif isinstance(at, list) and any(isinstance(each, dict) for each in at):
            for number, inner in enumerate(at):
                walk(inner, f"{key}.{number}")
        else:
            found[key] = printable(at if isinstance(at, str) else json.dumps(at, default=str))[:300]

    walk(value, "")
    return found


def _host(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of each record, the numbers that a chart shows, flattened: `workers.0.gib`, `cards.0.temperature`."""
    rows = []
    for record in records:
        row: dict[str, Any] = {}

        def walk(at: object, key: str, row: dict[str, Any] = row) -> None:
            if isinstance(at, Mapping):
                for name, inner in at.items():
                    walk(inner, f"{key}.{name}" if key else str(name))
            elif isinstance(at, list):
                for number, inner in enumerate(at):
                    walk(inner, f"{key}.{number}")
            elif isinstance(at, int | float) and not isinstance(at, bool):
                row[key] = at

        walk(record, "")
        rows.append(row)
    return rows


def _tail(path: Path, most: int) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [printable(line)[:400] for line in lines[-most:]]


def _lines(path: Path) -> dict[str, Any]:
    """How many lines there are, and the newest."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError:
        return {"count": 0, "newest": []}
    return {"count": len(lines), "newest": [printable(line)[:300] for line in lines[-20:]]}


def _checkpoints(run_dir: Path) -> list[dict[str, Any]]:
    found = []
    for place in sorted((run_dir / "checkpoints").glob("step-????????")):
        try:
            size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        except OSError:
            continue
        found.append({"name": place.name, "gib": round(size / _GIB, 2)})
    return found


def _samples(folder: Path) -> list[dict[str, Any]]:
    """Drawings of evenly chosen steps: images as small WebP, at most 24 x 8 of them."""
    drawn = sorted(place for place in folder.glob("step-????????*") if place.is_dir())
    names = sorted({place.name[13:] for place in drawn})
    chosen = [place for place in drawn if place.name[13:] == names[-1]] if names else []
    if len(chosen) > _SAMPLE_STEPS:
        chosen = [chosen[i * (len(chosen) - 1) // (_SAMPLE_STEPS - 1)] for i in range(_SAMPLE_STEPS)]
    found = []
    for place in chosen:
        images = [image for file in sorted(place.glob("*.png"))[:_SAMPLE_IMAGES] if (image := _small(file))]
        if images:
            found.append({"step": int(place.name[5:13]), "of": place.name[14:], "images": images})
    return found


def _small(file: Path) -> str | None:
    """An image, small; None of what is none. A page that is asked for anew makes no image twice."""
    try:
        found = file.stat()
    except OSError:
        return None
    return _made_small(file, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=2 * _SAMPLE_STEPS * _SAMPLE_IMAGES)
def _made_small(file: Path, size: int, mtime_ns: int) -> str | None:
    from PIL import Image

    from trainer.guards import DEFAULT_LIMITS
    from trainer.raster import DECODE_ERRORS, open_image

    try:
        with open_image(file, DEFAULT_LIMITS) as image:
            small = image.convert("RGB")
            small.thumbnail((_SAMPLE_PX, _SAMPLE_PX), Image.Resampling.LANCZOS)
    except DECODE_ERRORS:
        return None
    data = io.BytesIO()
    small.save(data, format="WEBP", quality=82)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()

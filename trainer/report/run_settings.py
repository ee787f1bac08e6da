"""The settings of runs, as a page lists and compares them; and the run before a run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from trainer.config.yaml_source import YamlError, parse
from trainer.errors import printable
from trainer.guards import Refused, open_regular
from trainer.report.run_series import METRICS, is_number, json_records

CONFIG = "config.resolved.yaml"
_LONGEST = 300  # characters of a value
_MOST_BYTES = 4 << 20
_HEAD_BYTES = 1 << 16
_MOST_RUNS = 500  # of a folder, that are looked at
_OWN = {"run.dir"}  # no two runs have the same


def run_settings(run_dir: Path) -> dict[str, str]:
    """By key such as `train.steps`, as text; nothing where there is no readable file of them."""
    path = run_dir / CONFIG
    try:
        found = path.stat()
    except OSError:
        return {}
    return _read_settings(path, found.st_size, found.st_mtime_ns)


@lru_cache(maxsize=64)
def _read_settings(path: Path, size: int, mtime_ns: int) -> dict[str, str]:
    try:
        with open_regular(path, _MOST_BYTES) as file:
            value = parse(file.read().decode("utf-8", "replace")).value
    except (OSError, Refused, YamlError):
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
            found[key] = printable(at if isinstance(at, str) else json.dumps(at, default=str), _LONGEST)

    walk(value, "")
    return found


def differing(settings: Sequence[Mapping[str, str]]) -> list[list[str]]:
    """Settings that are not the same in all runs: the key, and what each run has."""
    keys = sorted({key for each in settings for key in each} - _OWN)
    rows = [[key, *(each.get(key, "") for each in settings)] for key in keys]
    return [row for row in rows if len({*row[1:]}) > 1]


def previous_run(run_dir: Path) -> Path | None:
    """Of the runs in the same folder that began before this one, the newest; None where there is none."""
    begun = _begun(run_dir)
    if begun is None:
        return None
    own = run_dir.absolute()
    try:
        places = [place for place in own.parent.iterdir() if place != own and (place / CONFIG).is_file()]
    except OSError:
        return None
    others = [(began, place) for place in places[:_MOST_RUNS] if (began := _begun(place)) is not None]
    before = [(began, place) for began, place in others if began < begun]
    return max(before)[1] if before else None


def _begun(run_dir: Path) -> float | None:
    """When the first of its records was written that tells."""
    try:
        with open_regular(run_dir / METRICS) as file:
            head = file.read(_HEAD_BYTES).decode("utf-8", "replace").split("\n")[:-1]
    except (OSError, Refused):
        return None
    times = (record.get("time") for record in json_records(head))
    return next((float(when) for when in times if is_number(when)), None)

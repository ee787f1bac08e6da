"""One self-contained page of a run or of several: no network, no library; data as JSON, drawn by scripts in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer.report.data_facts import DataLook, FollowedData
from trainer.report.followed_run import FollowedRun
from trainer.report.run_settings import differing, previous_run, run_settings
from trainer.report.sample_images import samples_key
from trainer.report.series import POINTS

_PLACE = Path(__file__).parent
_PARTS = ("report.html", "report.css", "charts.js", "report.js")


class RunReport:
    """What a page shows of runs, the first one in full; asked again, it reads only what is new.

    Raises:
        UserError: one of them is no run directory.
    """

    def __init__(self, runs: Sequence[Path], look_at_data: Callable[[Path], DataLook] | None = None) -> None:
        """`look_at_data`: of the first run's directory; None: the page has nothing about the data set."""
        self._runs = [FollowedRun(run) for run in runs]
        self._data = FollowedData(lambda: look_at_data(runs[0])) if look_at_data else None
        self._previous = previous_run(runs[0]) if len(runs) == 1 else None

    def data(self) -> dict[str, Any]:
        """As it is now, JSON-able.

        Raises:
            UserError: one of them has no records yet.
        """
        points = max(POINTS // 8, POINTS // len(self._runs))  # so that the page stays as small
        found = [run.facts(in_full=number == 0, points=points) for number, run in enumerate(self._runs)]
        data = {"runs": found, "differing": differing([run["settings"] for run in found]) if len(found) > 1 else []}
        data["samples_key"] = samples_key(found[0]["samples"])
        if self._data:
            data["data"] = self._data.facts()
        if len(found) == 1:
            data["previous"] = self._of_previous(found[0]["settings"])
        return data

    def _of_previous(self, settings: dict[str, str]) -> dict[str, Any] | None:
        if self._previous is None:
            return None
        return {"name": self._previous.name, "rows": differing([settings, run_settings(self._previous)])}


def report_html(data: dict[str, Any], *, live: bool = False) -> str:
    """The page; `live`: it asks for newer data every ten seconds."""
    page, style, *scripts = ((_PLACE / name).read_text(encoding="utf-8") for name in _PARTS)
    # The data last: what stands in them is nobody's place to fill.
    filled = {"STYLE": style, "SCRIPT": "".join(scripts), "LIVE": "true" if live else "false", "DATA": as_json(data)}
    for name, text in filled.items():
        page = page.replace(f"/*{name}*/", text, 1)
    return page


def as_json(data: dict[str, Any]) -> str:
    """JSON that may stand within a script element, whatever texts are in it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def without_samples(data: dict[str, Any], key: str) -> dict[str, Any]:
    """The same for a page that has these samples already."""
    if key != data["samples_key"]:
        return data
    first, *others = data["runs"]
    return data | {"runs": [{name: value for name, value in first.items() if name != "samples"}, *others]}

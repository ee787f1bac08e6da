"""One self-contained page of a run or of several: no network, no library; data as JSON, drawn by a script in it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.report.run_facts import differing, run_facts

_PLACE = Path(__file__).parent


def report_data(runs: Sequence[Path]) -> dict[str, Any]:
    """What the page shows: the first run in full, the others as curves and settings beside it.

    Raises:
        UserError: as `run_facts`.
    """
    found = [run_facts(run, with_samples=number == 0) for number, run in enumerate(runs)]
    return {"runs": found, "differing": differing(found) if len(found) > 1 else []}


def report_html(data: dict[str, Any], *, live: bool = False) -> str:
    """The page; `live`: it asks for newer data every ten seconds."""
    page, style, script = ((_PLACE / name).read_text(encoding="utf-8") for name in _PARTS)
    # The data last: what stands in them is nobody's place to fill.
    filled = {"STYLE": style, "SCRIPT": script, "LIVE": "true" if live else "false", "DATA": as_json(data)}
    for name, text in filled.items():
        page = page.replace(f"/*{name}*/", text, 1)
    return page


_PARTS = ("report.html", "report.css", "report.js")


def as_json(data: dict[str, Any]) -> str:
    """JSON that may stand within a script element, whatever texts are in it."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")

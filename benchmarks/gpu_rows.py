"""Rows of the GPU benchmarks: told in a line, added to the document at once, and read from other scripts' output."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- gpu rows: begin -->", "<!-- gpu rows: end -->"
NOT_MEASURED = "not measured: no GPU here"
GIB = 2**30


def label(row: dict[str, Any]) -> str:
    """Which way to train."""
    return f"{row['workers']} x {row['strategy']}, batch {row['batch_size']}{', compiled' * row['compiled']}"


def told(row: dict[str, Any], precision: str) -> str:
    """A row's figures in a line."""
    height, width = row["bucket"]
    parts = [f"{row['images_per_s']:.2f} img/s at {width} x {height} px, {precision}; {row['step_s']:.3f} s a step"]
    parts[0] += f" ({', '.join(f'{phase} {seconds:.3f}' for phase, seconds in row['split'].items())}"
    exposed = "not measured" if row["exposed_s"] is None else f"{row['exposed_s']:.3f}"
    parts[0] += f", communication exposed {exposed})"
    parts.append("MFU " + (f"{row['mfu']:.1%}" if row["mfu"] else "unknown"))
    if row["measured_bytes"] is None:
        parts.append(f"GPU memory {NOT_MEASURED}")
    else:
        planned = f"{row['planned_bytes'] / GIB:.2f}" if row["planned_bytes"] else "nothing"
        measured, reserved = row["measured_bytes"] / GIB, row["reserved_bytes"] / GIB
        parts.append(f"tensors {measured:.2f} GiB, planned {planned}, reserved {reserved:.2f}")
    return "; ".join([*parts, f"{row['recomputed']} blocks recomputed", *row["notes"]])


def table_rows(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """The rows of a Markdown table, by the names of its columns."""
    heads: list[str] | None = None
    for line in lines:
        if not line.startswith("|"):
            continue
        cells = [text.strip() for text in line.strip().removeprefix("|").removesuffix("|").split("|")]
        if heads is None:
            heads = cells
        elif cells[0].strip("-"):
            yield dict(zip(heads, cells, strict=True))


def cell(text: str) -> str:
    """Text that stays within its cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


def failure(error: Exception) -> str:
    """In a line, why a section ended before its time."""
    told = str(error).strip().splitlines()
    return f"failed: {type(error).__name__}{': ' + told[-1] if told else ''}"


def tell(docs: Path | None, cards: str, what: str, measured: str) -> None:
    """Print a row, and add it to the document at once: what comes after it may fail."""
    line = f"| {date.today()} | {cards} | {cell(what)} | {cell(measured)} |"
    print(line, flush=True)
    if docs:
        add_row(docs, line)


def add_row(docs: Path, line: str) -> None:
    """Put the line before the end marker; the row that says that nothing was measured goes."""
    text = docs.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    rows, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{docs}: the lines {BEGIN} and {END} are missing")
    kept = [row for row in rows.splitlines() if row and not row.startswith(f"| - | - | everything | {NOT_MEASURED}")]
    docs.write_text(f"{before}{begin}\n" + "\n".join([*kept, line]) + f"\n{end}{after}", encoding="utf-8")


def product(*arguments: object) -> list[str]:
    """A command of sdxl-train."""
    return [sys.executable, "-m", "trainer", *map(str, arguments)]


def script_rows(script: str, *arguments: str) -> Iterator[tuple[str, str]]:
    """The rows of a benchmark beside this one, which prints each as JSON."""
    for line in lines_of([sys.executable, ROOT / "benchmarks" / script, *arguments]):
        what, measured = json.loads(line)
        yield what, measured


def run(command: Sequence[object]) -> str:
    """Its standard output."""
    return "\n".join(lines_of(command)).strip()


def lines_of(command: Sequence[object], limit_s: float | None = None) -> Iterator[str]:
    """The lines of its standard output as they come.

    Args:
        limit_s: seconds after which it is killed.

    Raises:
        RuntimeError: it failed, after its last line.
    """
    words, environment = list(map(str, command)), {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        killer = threading.Timer(limit_s or 0, process.kill)
        if limit_s:
            killer.start()
        try:
            for line in process.stdout:
                yield line.rstrip("\n")
        finally:
            killer.cancel()
    if process.returncode:
        raise RuntimeError(f"{' '.join(words[:3])} ended with exit code {process.returncode}")

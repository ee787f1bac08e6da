"""Rows that cannot be read while training: one line each in the run's `bad.jsonl`; too many of them end the run."""

import json
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.store.rows import RowProblem
from trainer.errors import UserError
from trainer.measure.telemetry import remove_records_after

BAD_FILE = "bad.jsonl"
JUDGED_FROM = 1000
"""Images that must have been read before their bad share is judged."""
_MEMORY = 100_000  # images: a drive that fails after months must not hide behind the good ones before

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BadRows:
    """How many rows could not be read, over all workers.

    Attributes:
        total: for people: a row counts each time it was tried, in earlier starts of the run as well.
        recent_images, recent_bad: since this start, the same on all workers; both are halved at 100,000 images.
    """

    total: int = 0
    recent_images: int = 0
    recent_bad: int = 0

    def after(self, images: int, bad: int) -> "BadRows":
        """With a step's `images`, of which `bad` could not be read."""
        recent_images, recent_bad = self.recent_images + images, self.recent_bad + bad
        if recent_images >= _MEMORY:
            recent_images, recent_bad = recent_images // 2, recent_bad // 2
        return BadRows(self.total + bad, recent_images, recent_bad)

    def too_many(self, max_fraction: float) -> bool:
        """Whether the share of bad rows is above `max_fraction`; not judged before `JUDGED_FROM` images."""
        return self.recent_images >= JUDGED_FROM and self.recent_bad > max_fraction * self.recent_images

    def as_error(self, max_fraction: float, run_dir: Path) -> UserError:
        """What ends the run."""
        return UserError(
            f"data.max_bad_fraction = {max_fraction:g}: {self.recent_bad:,} of the last {self.recent_images:,} "
            f"images could not be read, see {run_dir / BAD_FILE}; check the drive with `sdxl-train verify`, "
            "or allow more"
        )


def forget_bad_rows_after(run_dir: Path, step: int) -> BadRows:
    """Remove the lines of steps that are done again (rank 0, before the first of them); counts those that stay."""
    path = run_dir / BAD_FILE
    remove_records_after(path, step)
    return BadRows(total=len(path.read_bytes().splitlines()) if path.exists() else 0)


def record_bad_rows(run_dir: Path, step: int, rank: int, problems: Sequence[RowProblem]) -> None:
    """Append this worker's bad rows of a step; all workers write to the one file."""
    if not problems:
        return
    common = {"step": step, "rank": rank, "time": round(time.time(), 3)}
    records = [{**common, "file": p.file, "row": p.row, "offset": p.offset, "reason": p.reason} for p in problems]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    try:
        fd = os.open(run_dir / BAD_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, lines.encode(errors="backslashreplace"))  # at once, so that lines stay whole
        finally:
            os.close(fd)
    except OSError as error:
        _log.warning("%s: not written (%s): %s", run_dir / BAD_FILE, error.strerror, lines.strip())

"""`skipped.jsonl` in the run directory: each skipped step with its numbers and the keys of its images.

Each worker appends a line with the images that were its own. Nothing is removed: steps that are done again after a
restart, and skipped again, have lines again, with a later time.
"""

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path

SKIPPED_FILE = "skipped.jsonl"
_log = logging.getLogger(__name__)


def record_skipped_step(
    run_dir: Path, step: int, rank: int, reason: str, numbers: dict[str, float], keys: Sequence[str]
) -> None:
    """Append this worker's line; a number that is not finite is null, since JSON has no word for it."""
    finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    record = {"step": step, "rank": rank, "time": round(time.time(), 3), "reason": reason, **finite, "keys": keys}
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        fd = os.open(run_dir / SKIPPED_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.write(fd, line.encode(errors="backslashreplace"))  # at once, so that lines stay whole
        finally:
            os.close(fd)
    except OSError as error:
        _log.warning("%s: not written (%s): %s", run_dir / SKIPPED_FILE, error.strerror, line.strip())

"""What `prepare` keeps beside the data: its lock, and the lists of what is left out."""

import fcntl
import json
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

from trainer.data.catalog.catalog import bad_rows
from trainer.data.catalog.filtered import all_left_out
from trainer.data.catalog.reasons import Reasons
from trainer.data.catalog.settings import replace_file
from trainer.errors import UserError

_STEERS = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What steers a terminal and JSON leaves as it is."""


LEFT_OUT = "left-out.jsonl"


def write_left_out(prepared: Path, connection: sqlite3.Connection) -> None:
    """List all images that filters leave out in left-out.jsonl; without any, there is no such file."""
    rows = all_left_out(connection)
    first = next(rows, None)
    if first is None:
        (prepared / LEFT_OUT).unlink(missing_ok=True)
    else:
        replace_file(prepared / LEFT_OUT, (_line(*row) for row in chain([first], rows)))


def write_bad(prepared: Path, connection: sqlite3.Connection) -> Reasons:
    """List all images that cannot be used in bad.jsonl; returns why, and how many. There may be millions."""
    reasons = Reasons()

    def lines() -> Iterator[str]:
        for row in bad_rows(connection):
            reasons.add(row.path, row.reason)
            yield _line(row.path, row.key, row.reason)

    replace_file(prepared / "bad.jsonl", lines())
    return reasons


def _line(path: str, key: str, reason: str) -> str:
    line = json.dumps({"path": path, "key": key, "reason": reason}, ensure_ascii=False)
    return _STEERS.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n"


@contextmanager
def alone(prepared: Path) -> Iterator[None]:
    """No other process plans or commits in this folder meanwhile."""
    fd = os.open(prepared / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise UserError(f"data.prepared ({prepared}): another process is preparing this folder") from None
    finally:
        os.close(fd)

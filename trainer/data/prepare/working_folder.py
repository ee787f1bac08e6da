"""What `prepare` keeps beside the data: its lock, and the list of what is left out."""

import fcntl
import json
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.data.catalog.catalog import bad_rows
from trainer.data.catalog.settings import replace_file
from trainer.errors import UserError

_STEERS = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What steers a terminal and JSON leaves as it is."""


def write_bad(prepared: Path, connection: sqlite3.Connection) -> int:
    """List all images that are left out in bad.jsonl; returns their number. There may be millions."""
    count = 0

    def lines() -> Iterator[str]:
        nonlocal count
        for row in bad_rows(connection):
            count += 1
            line = json.dumps({"path": row.path, "key": row.key, "reason": row.reason}, ensure_ascii=False)
            yield _STEERS.sub(lambda found: f"\\u{ord(found[0]):04x}", line) + "\n"

    replace_file(prepared / "bad.jsonl", lines())
    return count


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

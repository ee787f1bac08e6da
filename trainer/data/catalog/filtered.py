"""The images that filters leave out, in a table of the catalogue, as the rows that they would be.

Those that were stored before are in `removed` as well, and come back from there when the filters let them. A catalogue
has the table from the first scan on that this version makes; older versions pass it over.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from trainer.data.catalog.catalog import ROW, CatalogRow, FileStamp, row_values
from trainer.data.catalog.changes import COLUMNS, set_aside
from trainer.data.catalog.filters import Reason

_TABLE = f"""
CREATE TABLE IF NOT EXISTS filtered (key TEXT NOT NULL UNIQUE, {ROW}, filter TEXT NOT NULL, reason TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS filtered_by_content ON filtered (content) WHERE content IS NOT NULL;
"""
_SIDE = "left out by "


class LeftOutBefore(NamedTuple):
    """What is known of an image that was left out; told as in `CatalogRow`."""

    key: str
    place: tuple[str, int]
    stamp: FileStamp
    repeats: int
    split: str
    original_hw: tuple[int, int]
    caption: str
    reason: Reason


def begin_filtering(connection: sqlite3.Connection) -> bool:
    """See to it that there is a table; returns whether it holds anything."""
    connection.executescript(_TABLE)
    return connection.execute("SELECT 1 FROM filtered LIMIT 1").fetchone() is not None


def left_out_between(connection: sqlite3.Connection, first: str, last: str) -> dict[str, LeftOutBefore]:
    """Those with keys from `first` to `last`, by key."""
    query = """SELECT key, path, offset, file_bytes, mtime_ns, caption_stamp, repeats, split, original_h, original_w,
        caption, filter, reason FROM filtered WHERE key BETWEEN ? AND ?"""
    return {
        v[0]: LeftOutBefore(v[0], v[1:3], FileStamp(*v[3:6]), v[6], v[7], v[8:10], v[10], Reason(*v[11:]))
        for v in connection.execute(query, (first, last))
    }


def leave_new_out(connection: sqlite3.Connection, rows: Sequence[tuple[CatalogRow, Reason]]) -> None:
    """Images that are no rows; what was said of them as bad is forgotten."""
    connection.executemany(
        f"INSERT OR REPLACE INTO filtered VALUES ({', '.join('?' * 26)})",
        [(*row_values(row, 0), *reason) for row, reason in rows],
    )
    connection.executemany("DELETE FROM bad WHERE key = ? AND path = ?", [(row.key, row.path) for row, _ in rows])


def leave_rows_out(connection: sqlite3.Connection, reasons: Sequence[tuple[str, Reason]]) -> None:
    """Rows of these keys, which are set aside."""
    connection.executemany(
        f"INSERT OR REPLACE INTO filtered SELECT key, {COLUMNS}, stored_key, ?, ? FROM rows WHERE key = ?",
        [(*reason, key) for key, reason in reasons],
    )
    by_filter = sorted(reasons, key=lambda pair: pair[1].filter)
    for name, group in groupby(by_filter, key=lambda pair: pair[1].filter):
        set_aside(connection, [key for key, _ in group], _SIDE + name)


def reword(connection: sqlite3.Connection, reasons: Iterable[tuple[str, Reason]]) -> None:
    """Images of these keys are still left out, for another reason."""
    connection.executemany(
        "UPDATE filtered SET filter = ?, reason = ? WHERE key = ?", [(*reason, key) for key, reason in reasons]
    )


def forget_left_out(connection: sqlite3.Connection, keys: Iterable[str]) -> None:
    """Images of these keys are not left out any more, or not listed."""
    connection.executemany("DELETE FROM filtered WHERE key = ?", [(key,) for key in keys])


def let_in(connection: sqlite3.Connection, keys: Sequence[str], generation: int) -> None:
    """Images of these keys join a generation as new rows."""
    columns = COLUMNS.replace("generation", f"{generation:d}")
    connection.executemany(
        f"INSERT INTO rows SELECT key, {columns}, NULL FROM filtered WHERE key = ?", [(key,) for key in keys]
    )
    forget_left_out(connection, keys)


def count_left_out(connection: sqlite3.Connection) -> Counter[str]:
    """How many each filter leaves out."""
    return Counter(dict(connection.execute("SELECT filter, COUNT(*) FROM filtered GROUP BY 1 ORDER BY 2 DESC, 1")))


def all_left_out(connection: sqlite3.Connection) -> Iterator[tuple[str, str, str]]:
    """(path, key, reason) of all, by key."""
    return iter(connection.execute("SELECT path, key, reason FROM filtered ORDER BY key"))

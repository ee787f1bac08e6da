"""A table on disk of all that the sources list, while they are looked through: millions of items, sorted once."""

import os
import shutil
import sqlite3
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from trainer.data.sources.source import MaskPlace, SourceItem

_SORT_KIB = 64 * 1024
"""Memory in which SQLite sorts; what is beyond goes to temporary files."""
_NONE = (None, None)


@contextmanager
def listing_table(connection: sqlite3.Connection, prepared: Path) -> Iterator[Path]:
    """The table `listing.listed`, without an index: millions of items in any order are appended, then sorted once.

    Gives the folder that it lies in, which is deleted afterwards, or by the next scan if this one is killed.
    """
    scratch = prepared / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    connection.execute("ATTACH ? AS listing", (str(scratch / "listing.sqlite"),))
    # SQLite's temporary files go where there is room for the data; the usual folder may be in memory.
    before = os.environ.get("SQLITE_TMPDIR")
    os.environ["SQLITE_TMPDIR"] = str(scratch.resolve())
    try:
        connection.execute("PRAGMA listing.journal_mode = OFF")
        connection.execute("PRAGMA listing.synchronous = OFF")
        connection.execute(f"PRAGMA main.cache_size = -{_SORT_KIB}")
        connection.execute(
            "CREATE TABLE listing.listed (key TEXT, file TEXT, offset INTEGER, length INTEGER, kind TEXT, caption TEXT,"
            " caption_path TEXT, repeats INTEGER, original_h INTEGER, original_w INTEGER, bucket_h INTEGER,"
            " bucket_w INTEGER, file_bytes INTEGER, mtime_ns INTEGER, mask TEXT)"
        )
        yield scratch
    finally:
        connection.execute("DETACH listing")
        shutil.rmtree(scratch, ignore_errors=True)
        if before is None:
            del os.environ["SQLITE_TMPDIR"]
        else:
            os.environ["SQLITE_TMPDIR"] = before


def add_listed(connection: sqlite3.Connection, items: Sequence[SourceItem]) -> None:
    """Append items, none of which has a problem."""
    connection.executemany(
        f"INSERT INTO listing.listed VALUES ({', '.join('?' * 15)})",
        [
            (*i[:8], *(i.original_hw or _NONE), *(i.bucket_hw or _NONE), *i[10:12], i.mask and i.mask.to_text())
            for i in items
        ],
    )


def listed_pages(connection: sqlite3.Connection, size: int) -> Generator[list[SourceItem], None, None]:
    """The listed items by key and place, `size` at a time."""
    with closing(connection.execute("SELECT * FROM listing.listed ORDER BY key, file, offset, rowid")) as cursor:
        while values := cursor.fetchmany(size):
            yield [
                SourceItem._make(
                    (*v[:8], _pair(v[8:10]), _pair(v[10:12]), *v[12:14], v[14] and MaskPlace.from_text(v[14]), "", None)
                )
                for v in values
            ]


def _pair(values: tuple[int | None, ...]) -> tuple[int, int] | None:
    first, second = values
    return None if first is None or second is None else (first, second)

"""Images of a folder that differ in nothing but the ending of their names: `dup.jpg` and `dup.png` have one key.

All are used if they are different pictures. The one that the catalogue knows under the key keeps it, else the first by
path; the others get theirs with the ending (`photos/dup.png`), and keep it when the first is gone. Listed items are
changed before they are gone through by key.
"""

import os
import sqlite3
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby, islice
from typing import NamedTuple

from trainer.data.catalog.catalog import BadRow, add_bad, transaction
from trainer.data.catalog.fingerprint import fingerprint
from trainer.data.catalog.judge import NEVER
from trainer.data.catalog.verdicts import Rules
from trainer.data.sources.source import WHOLE
from trainer.guards import Refused

_TABLE = "CREATE TABLE IF NOT EXISTS longer_keys (key TEXT PRIMARY KEY) WITHOUT ROWID"
_PAGE = 8192
_MOST_ROUNDS = 4
_OF_FOLDERS = "caption_path != '' AND kind = 'image'"
"""Items of folders alone have a caption file of their own, which may not exist."""


class _Item(NamedTuple):
    rowid: int
    key: str
    file: str
    content: int | None
    """None where it cannot be read."""


def tell_twins_apart(connection: sqlite3.Connection, rules: Rules, has_endings: bool) -> int:
    """Give the items of `listing.listed` that share a key keys of their own.

    Those that are the same picture as another of the name become bad rows; returns how many.

    Args:
        has_endings: whether any folder lists files of more than one ending.
    """
    connection.create_function("with_ending", 2, _with_ending, deterministic=True)
    connection.execute(_TABLE)
    same = 0
    for _ in range(_MOST_ROUNDS if has_endings else 0):  # a longer key may be another one's own
        connection.execute("DROP TABLE IF EXISTS listing.twins")
        connection.execute(
            f"""CREATE TABLE listing.twins AS SELECT rowid AS place, key, file FROM listing.listed
                WHERE {_OF_FOLDERS} AND key IN (SELECT key FROM listing.listed WHERE {_OF_FOLDERS}
                    GROUP BY key HAVING COUNT(*) > 1) ORDER BY key, file"""
        )
        found = _groups(connection)
        is_any = False
        while page := list(islice(found, _PAGE)):
            is_any = True
            with transaction(connection):
                for group in page:
                    bad = [*_told_apart(connection, rules, group)]
                    add_bad(connection, bad)
                    same += len(bad)
        if not is_any:
            break
    if connection.execute("SELECT 1 FROM longer_keys LIMIT 1").fetchone():  # of which the others may be gone
        connection.execute(
            f"""UPDATE listing.listed SET key = with_ending(key, file)
                WHERE {_OF_FOLDERS} AND with_ending(key, file) IN (SELECT key FROM longer_keys)"""
        )
    return same


def forget_longer_keys(connection: sqlite3.Connection) -> None:
    """Those that nothing has any more."""
    connection.execute(_TABLE)
    connection.execute(
        """DELETE FROM longer_keys WHERE NOT EXISTS (SELECT 1 FROM rows r WHERE r.key = longer_keys.key)
            AND NOT EXISTS (SELECT 1 FROM filtered f WHERE f.key = longer_keys.key)
            AND NOT EXISTS (SELECT 1 FROM bad b WHERE b.key = longer_keys.key)"""
    )


def _groups(connection: sqlite3.Connection) -> Iterator[list[_Item]]:
    """The items of each key that several have, by path."""
    items = connection.execute("SELECT place, key, file FROM listing.twins ORDER BY rowid")
    for _, group in groupby(items, key=lambda values: values[1]):
        yield [_Item(rowid, key, file, _content(file)) for rowid, key, file in group]


def _told_apart(connection: sqlite3.Connection, rules: Rules, group: list[_Item]) -> Iterator[BadRow]:
    """Changes all items of a key but one; gives those that are the same picture as another."""
    has_longer = [item for item in group if _has_longer_key(connection, item)]
    others = [item for item in group if item not in has_longer]
    owner = _owner(connection, rules, others)
    seen: dict[int, _Item] = {}
    for item in (*([owner] if owner else []), *has_longer, *(item for item in others if item is not owner)):
        key = _with_ending(item.key, item.file)
        if item.content is not None and seen.setdefault(item.content, item) is not item:
            connection.execute("DELETE FROM listing.listed WHERE rowid = ?", (item.rowid,))
            yield BadRow(item.file, key, NEVER, NEVER, f"is the same picture as {seen[item.content].file}")
        elif item is not owner:
            connection.execute("UPDATE listing.listed SET key = ? WHERE rowid = ?", (key, item.rowid))
            connection.execute("INSERT OR IGNORE INTO longer_keys VALUES (?)", (key,))


def _has_longer_key(connection: sqlite3.Connection, item: _Item) -> bool:
    key = _with_ending(item.key, item.file)
    return connection.execute("SELECT 1 FROM longer_keys WHERE key = ?", (key,)).fetchone() is not None


def _owner(connection: sqlite3.Connection, rules: Rules, items: list[_Item]) -> _Item | None:
    """The one that keeps the key, or gets it."""
    for table in ("rows", "filtered") if items else ():
        query = f"SELECT path FROM {table} WHERE key = ?"
        for (path,) in connection.execute(query, (items[0].key,)).fetchall():
            for item in items:
                if path == item.file or rules.is_moved((path, 0), (item.file, 0)):
                    return item
    return items[0] if items else None


def _content(file: str) -> int | None:
    with suppress(OSError, EOFError, Refused):
        return fingerprint(file, 0, WHOLE)
    return None


def _with_ending(key: str, file: str) -> str:
    return key + os.path.splitext(file)[1]  # noqa: PTH122 - no Path object per image

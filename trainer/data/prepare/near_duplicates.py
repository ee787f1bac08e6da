"""Of images that look the same, one stays: the largest in pixels, of equal ones the first by key.

Images are gone through in that order. Each is left out if it looks like one that stays; one that stays looks like none
of the others that do. All tables lie on disk; the hashes alone are held in memory while they are compared.
"""

import sqlite3

import numpy as np

from trainer.data.catalog.catalog import open_generation, transaction
from trainer.data.catalog.changes import begin_changes, recognize
from trainer.data.catalog.filtered import count_left_out, leave_rows_out, let_in, reword
from trainer.data.catalog.filters import NEAR_DUPLICATES, Reason
from trainer.data.catalog.listing_table import listing_table
from trainer.data.catalog.scan_counts import ScanCounts
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.prepare.near_pairs import first_of_near
from trainer.data.prepare.perceptual_hash import IMAGES, hash_images

_PAGE = 8192


def leave_near_duplicates_out(
    connection: sqlite3.Connection, settings: PrepareSettings, counts: ScanCounts, show_progress: bool
) -> None:
    """Apply `data.filters.near_duplicates` to what a scan has found, and put its counts right."""
    distance = settings.filters.near_duplicates
    if distance is None:
        return
    hash_images(connection, settings.limits, show_progress)
    with listing_table(connection, settings.prepared):
        _list_pictures(connection)
        _choose(connection, distance)
        _leave_out(connection, counts)
        is_any_in = _let_in(connection, counts)
    if is_any_in:
        begin_changes(connection)  # what has vanished is settled
        back = recognize(connection, with_captions=settings.text_encoders is not None)["back"]
        counts.back, counts.known, counts.new = counts.back + back, counts.known + back, counts.new - back
    counts.filtered = count_left_out(connection)


def _list_pictures(connection: sqlite3.Connection) -> None:
    """`pictures`, whose row numbers are their order, and `hashes`, each with its first picture and in their order."""
    connection.execute(
        f"""CREATE TABLE listing.pictures AS SELECT i.key AS key, i.path AS path, i.is_row AS is_row, p.hash AS hash
            FROM ({IMAGES}) i JOIN perceptual p ON p.content = i.id ORDER BY i.pixels DESC, i.key"""
    )
    connection.execute(
        "CREATE TABLE listing.hashes AS SELECT hash, MIN(rowid) AS first FROM listing.pictures GROUP BY hash"
        " ORDER BY first"
    )
    connection.execute("CREATE UNIQUE INDEX listing.by_hash ON hashes (hash)")


def _choose(connection: sqlite3.Connection, distance: int) -> None:
    """`chosen` (key, is_row, path): of each picture that is left out, the path of the one that stays for it."""
    (count,) = connection.execute("SELECT COUNT(*) FROM listing.hashes").fetchone()
    hashes, done = np.empty(count, dtype=np.int64), 0
    cursor = connection.execute("SELECT hash FROM listing.hashes ORDER BY rowid")
    while page := cursor.fetchmany(_PAGE):
        hashes[done : done + len(page)] = [value for (value,) in page]
        done += len(page)
    stays = first_of_near(hashes.view(np.uint64), distance)
    connection.execute("CREATE TABLE listing.likened (hash INTEGER PRIMARY KEY, stays INTEGER)")
    goes = np.flatnonzero(stays != np.arange(count))
    with transaction(connection):
        for begin in range(0, len(goes), _PAGE):
            rows = goes[begin : begin + _PAGE]
            values = np.stack([rows, stays[rows]], axis=1) + 1
            connection.executemany("INSERT INTO listing.likened VALUES (?, ?)", values.tolist())
    connection.execute(
        """CREATE TABLE listing.chosen AS SELECT p.key AS key, p.is_row AS is_row, s.path AS path
            FROM listing.pictures p JOIN listing.hashes h ON h.hash = p.hash
            LEFT JOIN listing.likened l ON l.hash = h.rowid
            LEFT JOIN listing.hashes o ON o.rowid = l.stays
            JOIN listing.pictures s ON s.rowid = IFNULL(o.first, h.first)
            WHERE p.rowid != s.rowid ORDER BY p.key"""
    )
    connection.execute("CREATE INDEX listing.chosen_by_key ON chosen (key)")


def _leave_out(connection: sqlite3.Connection, counts: ScanCounts) -> None:
    generation = open_generation(connection)
    query = """SELECT c.key, c.path, c.is_row, r.generation, x.key FROM listing.chosen c
        LEFT JOIN rows r ON r.key = c.key LEFT JOIN temp.replaced x ON x.key = c.key
        WHERE c.rowid > ? AND c.rowid <= ? ORDER BY c.rowid"""
    after = 0
    while page := connection.execute(query, (after, after + _PAGE)).fetchall():
        after += _PAGE
        reasons = {key: Reason(NEAR_DUPLICATES, f"is nearly the same picture as {path}") for key, path, *_ in page}
        with transaction(connection):
            leave_rows_out(connection, [(key, reasons[key]) for key, _, is_row, *_ in page if is_row])
            reword(connection, ((key, reasons[key]) for key, _, is_row, *_ in page if not is_row))
        for _, _, is_row, found_in, replaced in page:
            counts.changed -= bool(is_row and found_in == generation and replaced is not None)
            counts.new -= bool(is_row and found_in == generation and replaced is None)
            counts.known -= bool(is_row and found_in != generation)


def _let_in(connection: sqlite3.Connection, counts: ScanCounts) -> bool:
    """Those that were left out, and now look like none that stays; returns whether there were any."""
    generation, found = open_generation(connection), 0
    query = f"""SELECT key FROM filtered WHERE filter = '{NEAR_DUPLICATES}'
        AND NOT EXISTS (SELECT 1 FROM listing.chosen c WHERE c.key = filtered.key) LIMIT ?"""
    while keys := [key for (key,) in connection.execute(query, (_PAGE,))]:
        with transaction(connection):
            let_in(connection, keys, generation)
        found += len(keys)
    counts.new += found
    return found > 0

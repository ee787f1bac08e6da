"""The perceptual hash of each image, computed once and kept in a table of the catalogue.

64 bits (pHash, by `imagehash`): the signs of an image's lowest frequencies, which hardly change when it is resized or
compressed anew. An image is known by its `content`; one that has none, by where it lies and the time of its file.
"""

import sqlite3
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import xxhash
from tqdm import tqdm

from trainer.data.catalog.catalog import transaction
from trainer.data.catalog.filters import NEAR_DUPLICATES
from trainer.data.images import BadImage, load_grey, pillow_rules
from trainer.data.prepare.decode import located
from trainer.data.sources.parquet import CellReader
from trainer.guards import Limits

_THREADS = 4
_PAGE = 512
_ID = "IFNULL(content, picture_id(path, offset, length, file_bytes, mtime_ns))"

IMAGES = f"""SELECT key, path, offset, length, {_ID} AS id, original_h * original_w AS pixels, 1 AS is_row
        FROM rows WHERE payload != 'npz'
    UNION ALL SELECT key, path, offset, length, {_ID}, original_h * original_w, 0
        FROM filtered WHERE filter = '{NEAR_DUPLICATES}'"""
"""All images that are compared: those that no other filter leaves out and whose pixels are at hand."""
_WITHOUT_HASH = f"""FROM ({IMAGES}) i WHERE NOT EXISTS (SELECT 1 FROM perceptual p WHERE p.content = i.id)"""


def hash_images(connection: sqlite3.Connection, limits: Limits, show_progress: bool) -> None:
    """Fill the table `perceptual` (content, hash) with those that it lacks; what cannot be decoded has no hash.

    Can be killed at any moment and called again.
    """
    connection.create_function("picture_id", 5, _picture_id, deterministic=True)
    connection.execute("CREATE TABLE IF NOT EXISTS perceptual (content INTEGER PRIMARY KEY, hash INTEGER NOT NULL)")
    (total,) = connection.execute(f"SELECT COUNT(*) {_WITHOUT_HASH}").fetchone()
    if not total:
        return
    with (
        tqdm(total=total, desc="comparing", unit="img", disable=None if show_progress else True) as bar,
        pillow_rules(),
        ThreadPoolExecutor(_THREADS, "hash") as pool,
    ):
        hashes = _hashes(_images(connection), limits, pool)
        while page := list(islice(hashes, _PAGE)):
            with transaction(connection):
                connection.executemany(
                    "INSERT OR REPLACE INTO perceptual VALUES (?, ?)", [pair for pair in page if pair[1] is not None]
                )
            bar.update(len(page))


def _images(connection: sqlite3.Connection) -> Iterator[tuple[int, str, int, int]]:
    """(id, file, offset, length) of those without a hash, in the order of their keys, in which tables are quick."""
    after = ""
    query = f"SELECT i.key, i.id, i.path, i.offset, i.length {_WITHOUT_HASH} AND i.key > ? ORDER BY i.key LIMIT ?"
    while page := connection.execute(query, (after, _PAGE)).fetchall():
        after = page[-1][0]
        yield from (values[1:] for values in page)


def _hashes(
    images: Iterator[tuple[int, str, int, int]], limits: Limits, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, int | None]]:
    """(id, hash) of each; threads decode ahead, a few images at a time."""
    ahead: deque[tuple[int, Future[int | None] | None]] = deque()
    with closing(CellReader()) as cells:
        for number, file, offset, length in images:
            try:
                image = located(file, offset, length, cells)
                ahead.append((number, pool.submit(_hash, image, limits)))
            except BadImage:
                ahead.append((number, None))
            if len(ahead) > 2 * _THREADS:
                number, future = ahead.popleft()
                yield number, future and future.result()
        for number, future in ahead:
            yield number, future and future.result()


def _hash(image: Path | bytes, limits: Limits) -> int | None:
    """64 bits as a signed number; None where the image cannot be decoded, which is told when it is used."""
    import imagehash

    try:
        bits = imagehash.phash(load_grey(image, limits)).hash
    except BadImage:
        return None
    return int(np.packbits(bits).view(">i8")[0])


def _picture_id(path: str, offset: int, length: int, file_bytes: int, mtime_ns: int) -> int:
    """Below 0, where no `content` is."""
    text = f"{path}\0{offset}\0{length}\0{file_bytes}\0{mtime_ns}"
    return -1 - (xxhash.xxh3_64_intdigest(text.encode()) >> 1)

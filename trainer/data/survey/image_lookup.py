"""One image of a prepared set by its key."""

import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from trainer.config.spelling import nearest
from trainer.data.buckets import Bucket
from trainer.data.catalog.catalog import bad_rows
from trainer.data.store.shard_reader import RowRecord
from trainer.data.store.shards import ShardError
from trainer.data.store.snapshot import SPLITS, PreparedSet, ShardSummary
from trainer.errors import UserError

_NEIGHBOURS = 400
_MOST_NAMES = 20_000
_FORMAT_WITH_CHANGES = 4


@dataclass(frozen=True)
class StoredImage:
    """An image as the snapshot has it.

    Attributes:
        place: its number among the rows of the shard that count.
        first_row: its first virtual row in the bucket; `repeats` follow each other.
    """

    key: str
    shard: ShardSummary
    bucket: Bucket
    place: int
    first_row: int
    repeats: int
    record: RowRecord


def find_stored(prepared: PreparedSet, catalog: sqlite3.Connection | None, key: str) -> StoredImage:
    """The image of a key; the name of its source may be left out where that is enough.

    Args:
        catalog: the set's, where there is one; without it every shard is looked through.

    Raises:
        UserError: there is none, with the reason if it was left out, and else the nearest key that there is.
    """
    names = [name for name in (key, *(f"{source}/{key}" for source in _source_names(prepared))) if name]
    if catalog is None:
        return _without_catalog(prepared, key, names)
    known = [name for name in names if _group_of(catalog, name) is not None]
    if not known:
        raise UserError(_unknown(prepared, catalog, key, names))
    if known[0] != key and len(known) > 1:
        raise UserError(f"{key}: could be {' or '.join(f'`{name}`' for name in known[:3])}; write the whole key")
    for shard in _shards_of(prepared, catalog, known[0]):
        found = _in_shard(prepared, shard, [known[0]], [])
        if found is not None:
            return found
    raise UserError(
        f"{known[0]}: is planned, but not in snapshot {prepared.snapshot_name.removesuffix('.json')} of "
        f"{prepared.path} yet; type `sdxl-train prepare` again"
    )


def _group_of(catalog: sqlite3.Connection, key: str) -> tuple | None:
    stored_key = "IFNULL(stored_key, key)" if _knows_changes(catalog) else "key"
    query = f"SELECT generation, split, bucket_h, bucket_w, {stored_key} FROM rows WHERE key = ?"
    return catalog.execute(query, (key,)).fetchone()


def _knows_changes(catalog: sqlite3.Connection) -> bool:
    """Whether its format has what is renamed and removed; older ones are read as they are."""
    return catalog.execute("PRAGMA user_version").fetchone()[0] >= _FORMAT_WITH_CHANGES


def _shards_of(prepared: PreparedSet, catalog: sqlite3.Connection, key: str) -> Iterator[ShardSummary]:
    """Those that may hold it: one, as a rule."""
    group = _group_of(catalog, key)
    assert group is not None
    *columns, stored_key = group
    query = """SELECT name FROM shards WHERE row_generation = ? AND split = ? AND bucket_h = ? AND bucket_w = ?
        AND ? BETWEEN first_key AND last_key"""
    names = {name for (name,) in catalog.execute(query, (*columns, stored_key))}
    return (shard for shard in prepared.shards(group[1]) if shard.name in names)


def _without_catalog(prepared: PreparedSet, key: str, names: list[str]) -> StoredImage:
    seen: list[str] = []
    for shard in (shard for split in SPLITS for shard in prepared.shards(split)):
        found = _in_shard(prepared, shard, names, seen)
        if found is not None:
            return found
    raise UserError(f"{key}: no image of {prepared.path} has this key{_hint(key, seen)}")


def _in_shard(prepared: PreparedSet, shard: ShardSummary, names: list[str], seen: list[str]) -> StoredImage | None:
    """The first row of a shard with one of these keys; other keys are added to `seen`, as far as there is room."""
    try:
        _, repeats = prepared.read_captions(shard)
    except (ShardError, OSError) as error:
        raise UserError(f"{prepared.path / shard.name}: cannot be read: {error}") from error
    ours = [s for s in prepared.shards(shard.split, at_all_resolutions=True) if s.bucket_index == shard.bucket_index]
    first = sum(other.virtual_rows for other in ours[: ours.index(shard)])
    for place, within in enumerate(accumulate(repeats[:-1], initial=0)):
        record = prepared.read_record(shard.split, shard.bucket_index, first + within)
        if record is not None and record.key in names:
            bucket = prepared.buckets(shard.split)[shard.bucket_index]
            return StoredImage(record.key, shard, bucket, place, first + within, repeats[place], record)
        if record is not None and len(seen) < _MOST_NAMES:
            seen.append(record.key)
    return None


def _unknown(prepared: PreparedSet, catalog: sqlite3.Connection, key: str, names: list[str]) -> str:
    for name in names:
        bad = next(bad_rows(catalog, (name, "")), None)
        if bad is not None and bad.key == name:
            return f"{name}: was left out: {bad.reason} ({bad.path})"
    gone = (
        _knows_changes(catalog)
        and catalog.execute(
            f"SELECT key, reason FROM removed WHERE key IN ({', '.join('?' * len(names))})", names
        ).fetchone()
    )
    if gone:
        return f"{gone[0]}: has been removed from the set: {gone[1]}"
    sources, (_, _, tail) = _source_names(prepared), key.partition("/")
    tried = dict.fromkeys([*names, *(f"{source}/{tail}" for source in sources if tail)])
    near = (found for name in tried for found in _neighbours(catalog, name))
    return f"{key}: no image of {prepared.path} has this key{_hint(key, near)}"


def _neighbours(catalog: sqlite3.Connection, key: str) -> Iterator[str]:
    """Keys that stand beside it in their order."""
    for query in (
        "SELECT key FROM rows WHERE key >= ? ORDER BY key LIMIT ?",
        "SELECT key FROM rows WHERE key < ? ORDER BY key DESC LIMIT ?",
    ):
        for (name,) in catalog.execute(query, (key, _NEIGHBOURS)):
            yield name


def _hint(key: str, names: Iterable[str]) -> str:
    """By the whole key, or by it without its source."""
    whole = list(names)
    short = {name.partition("/")[2]: name for name in whole}
    near = nearest(key, whole) or short.get(nearest(key, short) or "")
    return f"; did you mean `{near}`?" if near else ""


def _source_names(prepared: PreparedSet) -> list[str]:
    """Those that keys begin with."""
    parts = (part for split in SPLITS for bucket in prepared.parts_per_bucket(split) for part in bucket)
    return sorted({source for source, _, _ in parts})

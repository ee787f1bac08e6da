"""Shards that other hosts have written for the same plan, taken into this prepared folder."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from trainer.data.catalog.catalog import open_catalog
from trainer.data.catalog.planned_shards import pending_shards, rows_of_shard
from trainer.data.catalog.settings import stored_settings, sync_folder
from trainer.data.store.shard_reader import OpenShard, read_keys
from trainer.data.store.shards import ShardError, read_info
from trainer.errors import UserError

_OF_HOSTS = ("data.sources",)  # whose places may differ


def take_shards(prepared: Path, others: Sequence[Path]) -> str:
    """Copy every planned shard that is not here from one of the other prepared folders; returns in words what was done.

    Raises:
        UserError: a folder was prepared with other settings, a shard is not whole, or is in none of them.
    """
    wanted = stored_settings(prepared)
    for other in others:
        found = stored_settings(other)
        differing = [name for name in wanted if name not in _OF_HOSTS and wanted[name] != found.get(name)]
        if differing:
            raise UserError(
                f"{other}: was prepared with another {differing[0]} than {prepared}; merge parts of one set"
            )
    with open_catalog(prepared, read_only=True) as connection:
        missing = [shard for shard in pending_shards(connection) if not (prepared / shard.name).exists()]
        lost, taken = [], 0
        for shard in tqdm(missing, desc="merging", unit="shard", disable=None):
            place = next((other / shard.name for other in others if (other / shard.name).is_file()), None)
            if place is None:
                lost.append(shard)
            else:
                _require_planned(place, {row.key_in_shard for row in rows_of_shard(connection, shard)})
                _copy(place, prepared / shard.name)
                taken += 1
    if lost:
        raise UserError(
            f"{len(lost):,} of {len(missing):,} shards are in none of the folders, such as {lost[0].name}: is a part "
            "missing, or has its `prepare --part` not come to its end? What was found is kept"
        )
    return f"merged: {taken:,} shards taken from {len(others)} folder{'s' * (len(others) > 1)}"


def _require_planned(place: Path, keys: set[str]) -> None:
    """UserError where a shard is not whole, or holds other images than these, or less."""
    try:
        info = read_info(place)
        shard = OpenShard(place, info.rows, info.offsets, info.file_bytes, info.header_crc32c)
        found = {*read_keys(shard), *(line["key"] for line in info.excluded)}
    except (ShardError, OSError) as error:
        raise UserError(f"{error}; encode that part again") from error
    if found != keys:
        odd = min(found ^ keys)
        raise UserError(f"{place}: is not of the set that is planned here, such as {odd}: its host saw other sources")


def _copy(place: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with place.open("rb") as source, temporary.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 24)
        target.flush()
        os.fsync(target.fileno())
    temporary.rename(path)
    sync_folder(path.parent)

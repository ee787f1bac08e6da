"""Where the images of a prepared set lie: rows of one shard and source that follow each other, and the same images at
other resolutions."""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.data.store.snapshot import PreparedSet
from trainer.data.store.snapshot_file import read_snapshot


@dataclass(frozen=True)
class Stretch:
    """Virtual rows (an image of r repeats counts r times) of a bucket that follow each other.

    Attributes:
        first: its first row in the bucket.
        elsewhere: by resolution the index of the bucket in which the same images lie, in the same order, and the first
            row there.
    """

    source: str
    first: int
    rows: int
    elsewhere: Mapping[int, tuple[int, int]]


def stretches_per_bucket(prepared: PreparedSet, split: str = "train") -> list[list[Stretch]]:
    """Of each bucket of a split those of the main resolution, in their order."""
    begins: dict[str, tuple[int, int]] = {}
    rows = [0] * len(prepared.buckets(split))
    for shard in prepared.shards(split, at_all_resolutions=True):
        begins[shard.name] = shard.bucket_index, rows[shard.bucket_index]
        rows[shard.bucket_index] += shard.virtual_rows
    entries = read_snapshot(prepared.path, prepared.snapshot_name).shards
    elsewhere: dict[str, dict[int, tuple[int, int]]] = {}
    for entry in entries:
        if entry.resolution and entry.name in begins:
            elsewhere.setdefault(entry.rows_of, {})[entry.resolution] = begins[entry.name]
    found: list[list[Stretch]] = [[] for _ in rows]
    for entry in entries:
        if entry.resolution or entry.name not in begins:
            continue
        bucket_index, first = begins[entry.name]
        before = 0
        for part in entry.parts:
            there = {at: (i, begin + before) for at, (i, begin) in elsewhere.get(entry.name, {}).items()}
            found[bucket_index].append(Stretch(part.source, first + before, part.virtual_rows, there))
            before += part.virtual_rows
    return found

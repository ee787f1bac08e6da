"""Which shards of a snapshot hold the rows of each bucket, in the order in which its rows are numbered."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.data.buckets import Bucket
from trainer.data.store.snapshot_file import ShardEntry


@dataclass(frozen=True)
class Group:
    """The shards of one bucket: their places in the snapshot, and cumulative virtual rows int64 [shards + 1]; first
    those of the main resolution, which hold `main_rows`."""

    bucket: Bucket
    shards: np.ndarray
    starts: np.ndarray
    main_rows: int
    parts: tuple[tuple[str, int, int], ...]
    """Of the main resolution: the name of a source, the first virtual row of a stretch of its rows, and how many they
    are."""


def groups_of(shards: Sequence[ShardEntry], split: str) -> list[Group]:
    """Those of one split that have rows, by bucket."""
    members: dict[Bucket, list[int]] = {}
    ours = [i for i, shard in enumerate(shards) if shard.split == split and shard.virtual_rows]
    for i in sorted(ours, key=lambda i: shards[i].resolution > 0):
        members.setdefault(shards[i].bucket, []).append(i)
    groups = []
    for bucket in sorted(members):
        counts = [shards[i].virtual_rows for i in members[bucket]]
        starts = np.cumsum([0, *counts], dtype=np.int64)
        main = [shards[i] for i in members[bucket] if not shards[i].resolution]
        parts = [part for shard in main for part in shard.parts]
        firsts = np.cumsum([0, *(part.virtual_rows for part in parts)]).tolist()
        stretches = tuple((part.source, first, part.virtual_rows) for part, first in zip(parts, firsts, strict=False))
        rows = sum(shard.virtual_rows for shard in main)
        groups.append(Group(bucket, np.array(members[bucket], dtype=np.int64), starts, rows, stretches))
    return groups

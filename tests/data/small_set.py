"""A small prepared set without a VAE, for tests of what reads it. Reader processes import this module."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from trainer.data.buckets import Bucket
from trainer.data.captions import caption_record
from trainer.data.catalog.settings import replace_file
from trainer.data.store.shards import EncodeText, RowBatch, ShardHead, read_info, write_shard
from trainer.data.store.snapshot_file import ShardEntry, Snapshot, snapshot_name, snapshot_to_json

ROWS_PER_SHARD = 5


def write_small_set(
    root: Path,
    rows: dict[Bucket, int],
    repeats: int = 1,
    encode_text: EncodeText | None = None,
    keep: Snapshot | None = None,
    with_masks: bool = False,
    record: Callable[[int], bytes] = lambda i: caption_record(f"photo {i}"),
) -> Path:
    """Image i of a bucket has the key `HxW/i`, the caption `photo i` (or another record) and latents, and if wanted a
    mask, that are all i.

    With `keep`, the rows are appended to that snapshot's as its next generation, with keys that begin with its number.
    """
    number = keep.number + 1 if keep else 1
    entries = list(keep.shards) if keep else []
    (root / "snapshots").mkdir(parents=True, exist_ok=True)
    for bucket, count in rows.items():
        shape = f"{bucket.height_px}x{bucket.width_px}" + (f"-{number}" if keep else "")
        head = ShardHead(bucket, "train", number, 0.13025, "xxh3:00", has_masks=with_masks)
        for begin in range(0, count, ROWS_PER_SHARD):
            images = range(begin, min(begin + ROWS_PER_SHARD, count))
            batch = RowBatch(
                np.stack([np.full(head.latent_shape, i, dtype=np.float16) for i in images]),
                [record(i).decode() for i in images],
                [f"{shape}/{i}" for i in images],
                np.array([[i, 1, 2, 3, bucket.height_px, bucket.width_px] for i in images], dtype=np.uint32),
                np.full(len(images), repeats, dtype=np.uint32),
                masks=np.stack([np.full(head.latent_shape[1:], i, dtype=np.uint8) for i in images])
                if with_masks
                else None,
            )
            name = f"{shape}-{begin}.safetensors"
            with (root / name).open("wb") as file:
                write_shard(file, head, [batch], [], encode_text)
            entries.append(ShardEntry(name, "train", bucket, read_info(root / name)))
    snapshot = Snapshot(number, (1,), {"the VAE's scaling_factor": 0.13025}, tuple(entries))
    replace_file(root / "snapshots" / snapshot_name(number), snapshot_to_json(snapshot))
    replace_file(root / "CURRENT", snapshot_name(number) + "\n")
    return root


def byte_tokens(captions: Sequence[str]) -> np.ndarray:
    """A tokenizer that anyone can check: the caption's bytes, and for the second encoder the same plus one."""
    ids = np.zeros((len(captions), 2, 77), dtype=np.int64)
    for i, caption in enumerate(captions):
        ids[i, 0, : len(caption)] = list(caption.encode())
    ids[:, 1] = ids[:, 0] + 1
    return ids


def failing_tokens(captions: Sequence[str]) -> np.ndarray:
    raise ArithmeticError(f"no tokens for {len(captions)} captions")

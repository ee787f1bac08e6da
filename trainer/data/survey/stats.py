"""What a prepared data set consists of: buckets, what was left out, and a sample of its images' sizes and texts."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from trainer.data.buckets import Bucket
from trainer.data.captions import CaptionRules, compose
from trainer.data.loss_weights import LossWeights
from trainer.data.sampler import pick_rows
from trainer.data.store.mask_counts import MaskCounts
from trainer.data.store.shard_reader import RowRecord
from trainer.data.store.shards import ShardError, count_masks, read_info
from trainer.data.store.snapshot import SPLITS, PreparedSet

BAD_FILE = "bad.jsonl"
"""In the prepared folder: the images that `prepare` left out."""


@dataclass(frozen=True)
class BucketCounts:
    """One bucket of one split."""

    split: str
    bucket: Bucket
    images: int
    per_epoch: int
    """Images with their repeats."""
    shards: int
    resolution: int
    """0: the main one; else the same images are held at this one as well."""

    @property
    def is_main(self) -> bool:
        """Whether it holds images that no other bucket holds."""
        return not self.resolution


@dataclass(frozen=True)
class Sample:
    """Images of the training split, spread evenly over it; a repeated image is as likely again to be among them."""

    rows: int
    """All training images, with repeats."""
    original_hw: np.ndarray
    """int64 [n, 2], in pixels; 0 where it is not known before the latents are read."""
    target_hw: np.ndarray
    """int64 [n, 2]: their buckets, in pixels."""
    texts: tuple[str, ...]
    """As they are trained without anything random."""
    loss_weights: np.ndarray
    """float32 [n]; empty where all images count the same."""
    unreadable: int


def bucket_counts(prepared: PreparedSet) -> list[BucketCounts]:
    """Every bucket that has images, by split and resolution."""
    counts = []
    for split in SPLITS:
        shards = prepared.shards(split, at_all_resolutions=True)
        for resolution in sorted({shard.resolution for shard in shards}):
            for index, bucket in enumerate(prepared.buckets(split)):
                ours = [s for s in shards if (s.bucket_index, s.resolution) == (index, resolution)]
                if ours:
                    images, per_epoch = sum(shard.rows for shard in ours), sum(shard.virtual_rows for shard in ours)
                    counts.append(BucketCounts(split, bucket, images, per_epoch, len(ours), resolution))
    return counts


def mask_counts(prepared: PreparedSet) -> MaskCounts | None:
    """Over both splits, from the shards' headers; None where no masks are stored. Damaged shards are passed over."""
    infos = []
    for shard in [shard for split in SPLITS for shard in prepared.shards(split)] if prepared.has_masks else ():
        with suppress(ShardError, OSError):
            infos.append(read_info(prepared.path / shard.name))
    return count_masks(infos)


def sample(
    prepared: PreparedSet, count: int, rules: CaptionRules, weights: LossWeights | None = None
) -> Iterator[Sample | None]:
    """Read the sizes and captions of at most `count` images; yields None after each, and the sample last.

    Args:
        weights: of the images in the loss, where they differ.
    """
    rows_per_bucket = prepared.rows_per_bucket("train")
    settled = rules.as_settled()
    sizes, texts, loss_weights, unreadable = [], [], [], 0
    for bucket, row in pick_rows(rows_per_bucket, count):
        record = prepared.read_record("train", bucket, row)
        if record is None:
            unreadable += 1
        else:
            sizes.append(_known(record))
            texts.append(compose(record.caption, settled, 0, 0))
            if weights is not None:
                loss_weights.append(weights.weight(record.key, record.caption))
        yield None
    columns = np.array(sizes, dtype=np.int64).reshape(-1, 6)
    found = np.array(loss_weights, dtype=np.float32)
    yield Sample(sum(rows_per_bucket), columns[:, :2], columns[:, 4:], tuple(texts), found, unreadable)


def _known(record: RowRecord) -> np.ndarray:
    """A row's sizes, with 0 for the size of an image of which only the latents are at hand, and that of the bucket."""
    is_latents = record.reference is not None and not any(record.reference.resized_hw)
    if is_latents and (record.sizes[:2] == record.sizes[4:]).all():
        return record.sizes * np.array([0, 0, 1, 1, 1, 1])
    return record.sizes

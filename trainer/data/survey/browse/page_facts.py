"""Everything that a page tells of a prepared set, gathered in bounded time and memory whatever the set's size."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from trainer.data.captions import CaptionRules, compose
from trainer.data.catalog.catalog import open_catalog
from trainer.data.loss_weights import TagSeparators
from trainer.data.sampler import pick_rows
from trainer.data.store.snapshot import SPLITS, PreparedSet
from trainer.data.store.snapshot_file import read_snapshot
from trainer.data.survey.browse.gallery import GalleryImage, gallery
from trainer.data.survey.browse.left_out_list import LeftOut, left_out_by_reason
from trainer.data.survey.browse.look_alikes import near_duplicates
from trainer.data.survey.browse.tag_facts import TagFacts, tag_facts
from trainer.data.survey.stats import BucketCounts, bucket_counts

SAMPLED_TEXTS = 20_000

Lengths = Callable[[Sequence[str]], list[int]]
Report = Callable[[str, int, int], object]
"""What is under way, how many more of it are done, and how many there are."""


@dataclass(frozen=True)
class TextMeasure:
    """How long texts are: `of` gives the lengths in `unit`; beyond `used`, if that is known, they are cut off."""

    of: Lengths
    unit: str
    used: int | None


@dataclass(frozen=True)
class SourceCounts:
    """The training images of one source, and how many they are with their repeats."""

    name: str
    images: int
    per_epoch: int


@dataclass(frozen=True)
class TextFacts:
    """The lengths of sampled texts, int64 [n], without anything random; of `rows` training images with repeats."""

    lengths: np.ndarray
    rows: int
    unreadable: int


@dataclass(frozen=True)
class PageFacts:
    """What a page shows.

    Attributes:
        images: of the training split and of validation, each once.
        sources: None where the snapshot does not tell.
        gallery_lengths: of the gallery's texts, in the unit of `measure`.
        duplicates: groups of places in `gallery`.
    """

    prepared: str
    snapshot: str
    holds_images: bool
    images: tuple[int, int]
    buckets: list[BucketCounts]
    sources: list[SourceCounts] | None
    texts: TextFacts
    measure: TextMeasure
    tags: TagFacts
    left_out: list[LeftOut]
    gallery: list[GalleryImage]
    gallery_lengths: list[int]
    duplicates: list[list[int]]


def page_facts(
    prepared: PreparedSet,
    rules: CaptionRules,
    separators: TagSeparators,
    measure: TextMeasure,
    num_images: int,
    report: Report = lambda what, done, total: None,
) -> PageFacts:
    """Gather all of it.

    Args:
        num_images: in the gallery, at most.
    """
    with ExitStack() as stack:
        has_catalog = (prepared.path / "catalog.sqlite").is_file()
        catalog = stack.enter_context(open_catalog(prepared.path, read_only=True)) if has_catalog else None
        shown = min(num_images, sum(prepared.rows_per_bucket("train")))
        images = gallery(prepared, catalog, rules, num_images, lambda n: report("pictures", n, shown))
    return PageFacts(
        prepared=str(prepared.path),
        snapshot=prepared.snapshot_name.removesuffix(".json"),
        holds_images=prepared.holds_images,
        images=(prepared.images("train"), prepared.images("validation")),
        buckets=bucket_counts(prepared),
        sources=source_counts(prepared),
        texts=text_facts(prepared, rules, measure.of, report),
        measure=measure,
        tags=tag_facts(prepared, separators, report),
        left_out=left_out_by_reason(prepared.path),
        gallery=images,
        gallery_lengths=measure.of([image.text for image in images]),
        duplicates=near_duplicates([image.thumbnail.fingerprint if image.thumbnail else None for image in images]),
    )


def source_counts(prepared: PreparedSet) -> list[SourceCounts] | None:
    """Most images first; exact, from the snapshot. None where it does not tell."""
    shards = [
        shard
        for shard in read_snapshot(prepared.path, prepared.snapshot_name).shards
        if shard.split == SPLITS[0] and not shard.resolution
    ]
    if any(shard.rows and not shard.parts for shard in shards):
        return None
    counts: dict[str, tuple[int, int]] = {}
    for part in (part for shard in shards for part in shard.parts):
        images, per_epoch = counts.get(part.source, (0, 0))
        counts[part.source] = images + part.rows, per_epoch + part.virtual_rows
    found = [SourceCounts(name, *numbers) for name, numbers in counts.items()]
    return sorted(found, key=lambda source: (-source.images, source.name))


def text_facts(
    prepared: PreparedSet,
    rules: CaptionRules,
    lengths: Lengths,
    report: Report = lambda what, done, total: None,
    count: int = SAMPLED_TEXTS,
) -> TextFacts:
    """Read at most `count` texts, spread evenly over the training images."""
    rows_per_bucket = prepared.rows_per_bucket("train")
    settled, found, unreadable, texts = rules.as_settled(), [], 0, []
    picked = pick_rows(rows_per_bucket, count)
    for number, (bucket, row) in enumerate(picked, start=1):
        record = prepared.read_record("train", bucket, row)
        unreadable += record is None
        if record is not None:
            texts.append(compose(record.caption, settled, 0, 0))
        if len(texts) >= 500 or number == len(picked):
            found += lengths(texts)
            texts.clear()
        report("captions", 1, len(picked))
    return TextFacts(np.array(found, dtype=np.int64), sum(rows_per_bucket), unreadable)

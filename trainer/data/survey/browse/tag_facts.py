"""The tags of a prepared set as a page shows them: all of them counted, or in a very large set those of a sample."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import nlargest, nsmallest

from trainer.data.loss_weights import TagSeparators
from trainer.data.sampler import pick_rows
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.image_weights import counted
from trainer.data.survey.tag_counts import kept_counts
from trainer.errors import UserError

COUNTED_IMAGES = 2_000_000
"""A set of more images has its tags counted only where that was done before."""
SAMPLED_RECORDS = 100_000
SHOWN = 40
_FEW = (1, 2, 5, 10, 50)


@dataclass(frozen=True)
class TagFacts:
    """What was counted; an image counts as often as it is seen in an epoch.

    Attributes:
        looked_at: images, with repeats: of them the counts are.
        is_sample: these are not all.
        top, rare: tags with their images, the most and the least common.
        few: (n, how many tags are on at most n images).
        problem: why nothing was counted, else empty.
    """

    tagged: int
    looked_at: int
    is_sample: bool
    different: int
    top: list[tuple[str, int]]
    rare: list[tuple[str, int]]
    few: list[tuple[int, int]]
    problem: str = ""


def tag_facts(prepared: PreparedSet, separators: TagSeparators, report: Callable[[str, int, int], object]) -> TagFacts:
    """Count the tags of the training images, or take the counts that were kept for this snapshot."""
    images = prepared.images("train")
    counts = kept_counts(prepared, separators)
    if counts is None and images > COUNTED_IMAGES:
        return _of_sample(prepared, separators, report)
    try:
        counts = counts or counted(prepared, separators, lambda more: report("tags", more, images))
    except UserError as error:
        return TagFacts(0, 0, False, 0, [], [], [], problem=error.lines[0])
    return _facts(counts.images, counts.tagged, counts.tagged + counts.untagged, is_sample=False)


def _of_sample(prepared: PreparedSet, separators: TagSeparators, report: Callable[[str, int, int], object]) -> TagFacts:
    images: Counter[str] = Counter()
    tagged = looked_at = 0
    picked = pick_rows(prepared.rows_per_bucket("train"), SAMPLED_RECORDS)
    for bucket, row in picked:
        report("tags", 1, len(picked))
        record = prepared.read_record("train", bucket, row)
        if record is not None:
            names = separators.split(json.loads(record.caption))
            tagged, looked_at = tagged + bool(names), looked_at + 1
            images.update(names)
    return _facts(images, tagged, looked_at, is_sample=True)


def _facts(images: Mapping[str, int], tagged: int, looked_at: int, is_sample: bool) -> TagFacts:
    # Of few tags, the more common half is shown as common, the others as rare.
    by_count: Callable[[tuple[str, int]], tuple[int, str]] = lambda item: (-item[1], item[0])  # noqa: E731
    top = nsmallest(min(SHOWN, -(-len(images) // 2)), images.items(), key=by_count)
    rare = nlargest(min(SHOWN, len(images) // 2), images.items(), key=by_count)
    few = [(most, sum(count <= most for count in images.values())) for most in _FEW]
    return TagFacts(tagged, looked_at, is_sample, len(images), top, rare, few)

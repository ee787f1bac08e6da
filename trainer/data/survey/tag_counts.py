"""How often each tag occurs in a prepared set, and the weights that balance them.

Counted once for each snapshot, on several processes, and kept beside it in `tag-counts/`. What is kept per tag is its
count and one more number, from which the mean weight of all images follows for any weights of the tags.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from trainer.data.catalog.settings import replace_file
from trainer.data.fork_server import fork_server, take_signals
from trainer.data.loss_weights import TagBalance, TagSeparators
from trainer.data.store.shards import ShardError
from trainer.data.store.snapshot import PreparedSet, ShardSummary
from trainer.errors import UserError
from trainer.guards import Refused, read_json

FORMAT = "sdxl-train tag counts 1"
MOST_TAGS = 3_000_000
"""Different tags: more are no tags, and would fill the memory."""
_UNITS = 1 << 32
"""Shares are counted in parts of this, so that the order of the sum makes no difference."""
_SHARDS_AT_ONCE = 32
_ROWS_WORTH_A_PROCESS = 50_000

Report = Callable[[int], object]
"""How many more images were looked at."""


@dataclass(frozen=True)
class TagCounts:
    """Of the training images, each counted as often as it is seen in an epoch."""

    tagged: int
    """Images with tags."""
    untagged: int
    images: Mapping[str, int]
    """How many images have the tag."""
    shares: Mapping[str, int]
    """By tag the sum over these images of 1 / (number of the image's tags), in 2^-32."""

    @property
    def typical_count(self) -> int:
        """Half of all occurrences of tags are of tags that are at most so common.

        The median over different tags would be next to 1, because nearly all of them are rare: every tag that is
        trained often would end at the least weight, and nothing would be balanced.
        """
        counts = sorted(self.images.values())
        half, passed = sum(counts) / 2, 0
        for count in counts:
            passed += count
            if passed >= half:
                return count
        raise ValueError("there are no tags")


def balanced(counts: TagCounts, power: float, least: float, most: float) -> TagBalance:
    """Tag t of n_t images weighs w_t = clip((typical count / n_t)^power, least, most), an image with the tags T
    c / |T| * (sum of w_t over T); c is such that the mean over all images with tags is 1.

    The sum over all images is c * (sum over all tags of w_t s_t), with s_t the sum over the images that have the tag of
    1 / |T|. So one pass over the data suffices for every choice of the other numbers.
    """
    typical = counts.typical_count
    weights = {tag: min(max((typical / n) ** power, least), most) for tag, n in counts.images.items()}
    total = math.fsum(weights[tag] * share for tag, share in counts.shares.items()) / _UNITS
    scale = counts.tagged / total
    common = {tag: scale * weight for tag, weight in sorted(weights.items()) if weight < most}
    return TagBalance(common, scale * most)


def tag_counts(
    prepared: PreparedSet, separators: TagSeparators, processes: int, report: Report = lambda images: None
) -> TagCounts:
    """The counts of an open prepared set: as they were kept, or else counted and kept.

    Raises:
        UserError: there are more different tags than `MOST_TAGS`.
    """
    path, head = _kept_in(prepared, separators)
    kept = _read(path, head)
    if kept is not None:
        return kept
    counts = count_tags(prepared, separators, processes, report)
    try:
        path.parent.mkdir(exist_ok=True)
        document = {**head, **asdict(counts)}
        replace_file(path, json.dumps(document, ensure_ascii=False, separators=(",", ":")) + "\n")
    except OSError:
        pass  # a folder that is read-only: counted anew at each start
    return counts


def kept_counts(prepared: PreparedSet, separators: TagSeparators) -> TagCounts | None:
    """The counts of an open prepared set as they were kept; None where they were not counted yet."""
    return _read(*_kept_in(prepared, separators))


def count_tags(
    prepared: PreparedSet, separators: TagSeparators, processes: int, report: Report = lambda images: None
) -> TagCounts:
    """Look through the records of all training images; a shard that cannot be read counts nothing."""
    shards = prepared.shards("train")
    parts = [shards[begin : begin + _SHARDS_AT_ONCE] for begin in range(0, len(shards), _SHARDS_AT_ONCE)]
    total = TagCounts(0, 0, {}, {})
    for part, counts in _counted(prepared, separators, parts, processes):
        total = _added(total, counts, prepared)
        report(sum(shard.rows for shard in part))
    return total


def _counted(
    prepared: PreparedSet, separators: TagSeparators, parts: Sequence[Sequence[ShardSummary]], processes: int
) -> Iterator[tuple[Sequence[ShardSummary], TagCounts]]:
    """The counts of each part, in any order; no more are in memory than there are processes, and one."""
    if processes < 2 or prepared.images("train") < _ROWS_WORTH_A_PROCESS:
        for part in parts:
            yield part, _count_shards(prepared, separators, part)
        return
    with ProcessPoolExecutor(processes, fork_server(), take_signals) as pool:
        running: dict[Future[TagCounts], Sequence[ShardSummary]] = {}
        try:
            for part in parts:
                running[pool.submit(_count_shards, prepared, separators, part)] = part
                if len(running) > processes:
                    done = wait(running, return_when=FIRST_COMPLETED).done.pop()
                    yield running.pop(done), done.result()
            while running:
                done = wait(running, return_when=FIRST_COMPLETED).done.pop()
                yield running.pop(done), done.result()
        except BrokenProcessPool as error:
            raise UserError("counting tags: a process has died; if it was for want of memory, free some") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _count_shards(prepared: PreparedSet, separators: TagSeparators, shards: Sequence[ShardSummary]) -> TagCounts:
    images: dict[str, int] = {}
    shares: dict[str, int] = {}
    tagged = untagged = 0
    for shard in shards:
        try:
            records, repeats = prepared.read_captions(shard)
        except (ShardError, OSError):
            continue
        for record, times in zip(records, repeats, strict=True):
            try:
                names = separators.split(json.loads(record))
            except (ValueError, AttributeError, TypeError, RecursionError):
                continue  # damaged; told when the row is read
            if not names:
                untagged += times
                continue
            tagged += times
            share = times * _UNITS // len(names)
            for name in names:
                images[name] = images.get(name, 0) + times
                shares[name] = shares.get(name, 0) + share
    return TagCounts(tagged, untagged, images, shares)


def _added(total: TagCounts, part: TagCounts, prepared: PreparedSet) -> TagCounts:
    """The sum, in the memory of `total`."""
    for sums, added in ((total.images, part.images), (total.shares, part.shares)):
        assert isinstance(sums, dict)
        for name, number in added.items():
            sums[name] = sums.get(name, 0) + number
    if len(total.images) > MOST_TAGS:
        raise UserError(
            f"data.prepared ({prepared.path}): holds more than {MOST_TAGS:,} different tags, which cannot be weighted; "
            "are they tags? See captions.tag_separator and caption_files_hold"
        )
    return replace(total, tagged=total.tagged + part.tagged, untagged=total.untagged + part.untagged)


def _kept_in(prepared: PreparedSet, separators: TagSeparators) -> tuple[Path, dict[str, Any]]:
    """The file of the counts, and what it begins with if it is of this snapshot as it is now."""
    snapshot = (prepared.path / "snapshots" / prepared.snapshot_name).read_bytes()
    head = {
        "format": FORMAT,
        "snapshot": hashlib.blake2b(snapshot, digest_size=16).hexdigest(),
        "separators": [separators.tag, *separators.others],
    }
    digest = hashlib.blake2b(json.dumps(head).encode(), digest_size=4).hexdigest()
    return prepared.path / "tag-counts" / f"{Path(prepared.snapshot_name).stem}-{digest}.json", head


def _read(path: Path, head: Mapping[str, Any]) -> TagCounts | None:
    try:
        document = read_json(path)
        if {name: document.get(name) for name in head} != head:
            return None
        return TagCounts(*(document[field.name] for field in fields(TagCounts)))
    except (OSError, Refused, KeyError, AttributeError, TypeError):
        return None  # not there, or damaged

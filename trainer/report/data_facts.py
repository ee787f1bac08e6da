"""What a page says of a run's data: images, buckets, sources, captions, what was left out; in bounded time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.data.captions import CaptionRules
from trainer.data.store.snapshot import PreparedSet
from trainer.data.store.snapshot_file import current_snapshot
from trainer.data.survey.browse.left_out_list import left_out_by_reason
from trainer.data.survey.browse.page_facts import TextMeasure, source_counts, text_facts
from trainer.data.survey.stats import BAD_FILE, bucket_counts
from trainer.errors import UserError, printable

_SAMPLED_TEXTS = 4000
_BARS = 24  # of the histogram
_ROWS = 60  # of a table
_MOST_TOKENS = 2**20


@dataclass(frozen=True)
class DataLook:
    """How a run looks at its data: the prepared folder, how captions become texts, and how long these are."""

    prepared: Path
    rules: CaptionRules
    measure: TextMeasure


class FollowedData:
    """The facts of a prepared folder, gathered anew when its snapshot or its list of what was left out has changed."""

    def __init__(self, look: Callable[[], DataLook]) -> None:
        """`look` is called when it is first wanted; it may raise UserError, which is told on the page."""
        self._look, self._found = look, None
        self._state: object = None
        self._facts: dict[str, Any] = {}

    def facts(self) -> dict[str, Any]:
        """JSON-able; `problem` alone where there is nothing to look at."""
        try:
            look = self._found = self._found or self._look()
            state = _state(look.prepared)
            if state is None or state != self._state:
                self._facts, self._state = data_facts(look), state
        except (UserError, OSError) as error:
            self._facts, self._state = {"problem": printable(str(error), 400)}, None
        return self._facts


def data_facts(look: DataLook) -> dict[str, Any]:
    """Of the newest snapshot.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    prepared = PreparedSet.open(look.prepared)
    buckets = [each for each in bucket_counts(prepared) if each.split == "train"]
    sources = source_counts(prepared)
    texts = text_facts(prepared, look.rules, look.measure.of, count=_SAMPLED_TEXTS)
    left_out = left_out_by_reason(prepared.path)
    return {
        "prepared": printable(str(prepared.path), 4096),
        "snapshot": prepared.snapshot_name.removesuffix(".json"),
        "images": [prepared.images("train"), prepared.images("validation")],
        "per_epoch": sum(prepared.rows_per_bucket("train")),
        "buckets": [
            [each.bucket.width_px, each.bucket.height_px, each.images, each.per_epoch, each.resolution]
            for each in sorted(buckets, key=lambda each: -each.images)[:_ROWS]
        ],
        "num_buckets": len(buckets),
        "sources": [[printable(each.name), each.images, each.per_epoch] for each in (sources or ())[:_ROWS]],
        "num_sources": len(sources or ()),
        "texts": _lengths(texts.lengths, look.measure) | {"unreadable": texts.unreadable},
        "left_out": [[each.reason, each.images] for each in left_out[:_ROWS]],
        "num_left_out": sum(each.images for each in left_out),
    }


def _lengths(lengths: np.ndarray, measure: TextMeasure) -> dict[str, Any]:
    """A histogram of bars of equal width, up to where all but one in two hundred are; the last bar has those too."""
    found: dict[str, Any] = {"unit": measure.unit, "used": measure.used, "sampled": len(lengths)}
    if not len(lengths):
        return found
    middle, high, nearly_all = np.quantile(lengths, (0.5, 0.95, 0.995)).tolist()
    width = max(1, -(-(int(min(nearly_all, _MOST_TOKENS)) + 1) // _BARS))
    bars = np.bincount(np.minimum(lengths // width, _BARS - 1))
    found |= {"width": width, "bars": bars.tolist(), "median": middle, "high": high, "most": int(lengths.max())}
    found["empty"] = int((lengths == 0).sum())
    if measure.used is not None:
        found["cut"] = int((lengths > measure.used).sum())
    return found


def _state(prepared: Path) -> object:
    """What all facts follow from; None if there is nothing."""
    name = current_snapshot(prepared)
    try:
        bad = (prepared / BAD_FILE).stat()
    except OSError:
        return name and (name, None, None)
    return name and (name, bad.st_size, bad.st_mtime_ns)

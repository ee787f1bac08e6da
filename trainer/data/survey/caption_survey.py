"""A look at what a data set's captions become, before time is spent on training with them.

A sample of the records is composed as the readers will do it; nothing is written and torch is not needed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.captions import WEIGHT_MARK, CaptionRules, compose, holds_several
from trainer.data.catalog.catalog import open_catalog
from trainer.data.sampler import pick_rows
from trainer.data.store.snapshot import PreparedSet
from trainer.keyed import draw_seed

SAMPLED_ROWS = 2000
_DRAWS = 2


@dataclass(frozen=True)
class CaptionExample:
    """An image's texts at its first draws; one where the rules are not random."""

    key: str
    texts: tuple[str, ...]


@dataclass(frozen=True)
class CaptionSurvey:
    """What was found in a sample of records; `texts` are without anything random, and so before any dropout."""

    texts: tuple[str, ...]
    empty_keys: tuple[str, ...]
    """Images whose text is empty."""
    with_tags: int
    """Records that hold tags."""
    with_several: int
    """Records that hold several captions, or a field of several lines."""
    with_weights: int
    """Records that hold a loss weight of the image's own, other than 1."""
    examples: tuple[CaptionExample, ...]

    @property
    def empty_fraction(self) -> float:
        """Of the sampled records; 0 where there are none."""
        return len(self.empty_keys) / max(1, len(self.texts))


def sampled_records(prepared: PreparedSet, count: int = SAMPLED_ROWS) -> list[tuple[str, str]]:
    """(key, caption record) of at most `count` training rows, spread evenly; those that cannot be read are left out."""
    picked = pick_rows(prepared.rows_per_bucket("train"), count)
    records = (prepared.read_record("train", bucket, row) for bucket, row in picked)
    return [(record.key, record.caption) for record in records if record is not None]


def planned_records(prepared: Path, count: int = SAMPLED_ROWS) -> list[tuple[str, str]]:
    """(key, caption record) of at most `count` catalogued training images, spread evenly, encoded or not."""
    with open_catalog(prepared, read_only=True) as connection:
        (last,) = connection.execute("SELECT COALESCE(MAX(rowid), 0) FROM rows").fetchone()
        picked = [row + 1 for _, row in pick_rows([last], count)]
        query = f"SELECT key, caption FROM rows WHERE rowid IN ({', '.join('?' * len(picked))}) AND split = 'train'"
        return connection.execute(query, picked).fetchall()


def survey_captions(
    records: Sequence[tuple[str, str]], rules: CaptionRules, seed: int, num_examples: int
) -> CaptionSurvey:
    """Compose the texts of (key, caption record) pairs.

    Args:
        seed: the run's; an example's texts are those of the image's first epochs.
        num_examples: images whose texts are shown, spread evenly over those that have one.
    """
    settled = rules.as_settled()
    texts = tuple(compose(record, settled, 0, 0) for _, record in records)
    filled = [pair for pair, text in zip(records, texts, strict=True) if text]
    step = max(1, len(filled) // max(1, num_examples))
    return CaptionSurvey(
        texts=texts,
        empty_keys=tuple(key for (key, _), text in zip(records, texts, strict=True) if not text),
        with_tags=sum(bool((json.loads(record).get("tags") or "").strip()) for _, record in records),
        with_several=sum(map(holds_several, (json.loads(record) for _, record in records))),
        with_weights=sum(WEIGHT_MARK in record for _, record in records),
        examples=tuple(_example(key, record, rules, seed) for key, record in filled[::step][:num_examples]),
    )


def _example(key: str, record: str, rules: CaptionRules, seed: int) -> CaptionExample:
    epochs = range(_DRAWS if rules.is_random else 1)
    return CaptionExample(key, tuple(compose(record, rules, draw_seed(seed, "caption", e, key, 0), e) for e in epochs))

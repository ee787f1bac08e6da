"""How much each image counts in the loss, told from its key and its caption record when it is read.

Nothing is kept per image: the weights of sources and of tags are two small tables, and an image's own weight stands in
its record. The weight of an image is the product of all that apply, and at most `MOST_LOSS_WEIGHT`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.captions import MOST_LOSS_WEIGHT


@dataclass(frozen=True)
class TagSeparators:
    """What stands between tags, as `captions` has it: `tag`, and others that separate as well."""

    tag: str = ","
    others: tuple[str, ...] = ()

    def split(self, fields: Mapping[str, Any]) -> list[str]:
        """The tags of a caption record, each once: those of the first line that is not empty, as a run without anything
        random trains them."""
        text = fields.get("tags")
        if not text:
            return []
        if "\n" in text:
            text = text.strip().partition("\n")[0]
        for other in self.others:
            text = text.replace(other, self.tag)
        return [*dict.fromkeys(filter(None, map(str.strip, text.split(self.tag))))]


@dataclass(frozen=True)
class TagBalance:
    """Weights of tags by how often each occurs in the data, of which an image counts the mean."""

    common: Mapping[str, float]
    """Tags that weigh less than `rare`. In real data they are few: most tags are rare."""
    rare: float
    """What all others weigh."""


@dataclass(frozen=True)
class LossWeights:
    """The weights of a run; a function of a row's key and record alone. Pickles small, for reader processes."""

    sources: Mapping[str, float]
    """By the name that a source's keys begin with. One that is not named counts 1, such as a source that was added to
    the prepared data while the run was going on."""
    per_image: bool = False
    """Whether the weights that stand in the records count."""
    listed: Mapping[str, float] | None = None
    """Of tags, of which an image counts the product; others count 1."""
    balance: TagBalance | None = None
    separators: TagSeparators = TagSeparators()

    def of(self, keys: Sequence[str], records: Sequence[str]) -> NDArray[np.float32]:
        """The weight of each image, [m]; 1 where the record is empty because the row could not be read."""
        pairs = zip(keys, records, strict=True)
        return np.array([self.weight(key, record) if record else 1.0 for key, record in pairs], dtype=np.float32)

    def weight(self, key: str, record: str) -> float:
        """The weight of one image."""
        weight = self.sources.get(key.partition("/")[0], 1.0)
        if self.per_image or self.listed or self.balance:
            fields = json.loads(record)
            if self.per_image:
                weight *= fields.get("loss_weight", 1.0)
            if self.listed or self.balance:
                weight *= self._of_tags(self.separators.split(fields))
        return min(weight, MOST_LOSS_WEIGHT)

    def _of_tags(self, tags: Sequence[str]) -> float:
        if not tags:
            return 1.0
        weight = 1.0
        if self.balance:
            common, rare = self.balance.common, self.balance.rare
            weight = sum(common.get(tag, rare) for tag in tags) / len(tags)
        if self.listed:
            for tag in tags:
                weight *= self.listed.get(tag, 1.0)
        return weight

    def to_json(self) -> dict[str, Any]:
        """A JSON-able record; `from_json` gives the same weights back, to the last bit."""
        return asdict(self)

    @staticmethod
    def from_json(record: Mapping[str, Any]) -> "LossWeights":
        balance, separators = record["balance"], record["separators"]
        return LossWeights(
            record["sources"],
            record["per_image"],
            record["listed"],
            balance and TagBalance(**balance),
            TagSeparators(separators["tag"], tuple(separators["others"])),
        )

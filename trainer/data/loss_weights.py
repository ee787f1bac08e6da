"""How much each image counts in the loss, told from its key and its caption record when it is read.

Nothing is kept per image: the weights of sources and of tags are two small tables, and an image's own weight stands in
its record. The weight of an image is the product of all that apply, and at most `MOST_LOSS_WEIGHT`.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.captions import MOST_LOSS_WEIGHT

Factor = Callable[[Mapping[str, Any]], float]
"""The fields of a caption record -> what its image's weight is multiplied by."""


@dataclass(frozen=True)
class LossWeights:
    """The weights of a run; a function of a row's key and record alone. Pickles small, for reader processes."""

    sources: Mapping[str, float]
    """By the name that a source's keys begin with. One that is not named counts 1, such as a source that was added to
    the prepared data while the run was going on."""
    factors: tuple[Factor, ...] = ()
    """What is read in the records."""

    def of(self, keys: Sequence[str], records: Sequence[str]) -> NDArray[np.float32]:
        """The weight of each image, [m]; 1 where the record is empty because the row could not be read."""
        pairs = zip(keys, records, strict=True)
        return np.array([self.weight(key, record) if record else 1.0 for key, record in pairs], dtype=np.float32)

    def weight(self, key: str, record: str) -> float:
        """The weight of one image."""
        weight = self.sources.get(key.partition("/")[0], 1.0)
        if self.factors:
            fields = json.loads(record)
            for factor in self.factors:
                weight *= factor(fields)
        return min(weight, MOST_LOSS_WEIGHT)


def own_weight(fields: Mapping[str, Any]) -> float:
    """A factor: what the data say of the image itself; 1 where they say nothing."""
    return fields.get("loss_weight", 1.0)


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
class ListedTags:
    """A factor: the product of the weights of those tags that are listed."""

    weights: Mapping[str, float]
    separators: TagSeparators

    def __call__(self, fields: Mapping[str, Any]) -> float:
        """1 where none is listed."""
        weight = 1.0
        for tag in self.separators.split(fields):
            weight *= self.weights.get(tag, 1.0)
        return weight


@dataclass(frozen=True)
class BalancedTags:
    """A factor: the mean weight of the image's tags, by how often each occurs in the data."""

    common: Mapping[str, float]
    """Tags that weigh less than `rare`. In real data they are few: most tags are rare."""
    rare: float
    """What all others weigh."""
    separators: TagSeparators

    def __call__(self, fields: Mapping[str, Any]) -> float:
        """1 where there are no tags."""
        tags = self.separators.split(fields)
        return sum(self.common.get(tag, self.rare) for tag in tags) / len(tags) if tags else 1.0

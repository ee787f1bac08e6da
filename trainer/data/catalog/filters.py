"""Whether an image is left out on purpose: by its size, shape, caption, tags or score, as `data.filters` says."""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from trainer.config.sections.data.filters_config import FiltersConfig
from trainer.config.sections.data.sources import Source
from trainer.data.loss_weights import TagSeparators
from trainer.data.sources.listing import source_names

NEAR_DUPLICATES = "near duplicates"
"""The filter that compares images with one another, which is applied when all others are through."""


class Reason(NamedTuple):
    """Why an image is left out: the filter as it is counted, and the words for it."""

    filter: str
    text: str


@dataclass(frozen=True)
class Filters:
    """All filters but that of near duplicates; a function of an image's size and caption record alone."""

    wish: FiltersConfig
    separators: TagSeparators
    sources: tuple[Source, ...]

    @cached_property
    def is_on(self) -> bool:
        """Whether any of them, near duplicates included, may leave an image out."""
        return self.wish.is_on

    @cached_property
    def reads_records(self) -> bool:
        """Whether the caption record is looked at."""
        return self.wish.reads_records

    @cached_property
    def _scored(self) -> frozenset[str]:
        """Names of the sources whose images have scores."""
        pairs = zip(self.sources, source_names(self.sources), strict=True)
        fields = ("score_field", "score_column")
        return frozenset(name for source, name in pairs if any(getattr(source, field, None) for field in fields))

    def reason(self, key: str, original_hw: tuple[int, int], record: str) -> Reason | None:
        """Why the image is left out, or None; the first filter that does so counts.

        Args:
            original_hw: in pixels, as displayed.
            record: the caption record; anything where it is not read.
        """
        found = self._of_size(original_hw)
        if found is None and self.reads_records:
            fields = json.loads(record)
            found = self._of_caption(fields) or self._of_tags(fields) or self._of_score(key, fields)
        return found

    def _of_size(self, original_hw: tuple[int, int]) -> Reason | None:
        wish, (height, width) = self.wish, original_hw
        if wish.min_side_px is not None and min(height, width) < wish.min_side_px:
            return _reason("shorter side", f"its shorter side is {min(height, width)} px", "min_side_px", wish)
        aspect = f"its width is {width / height:.4g} times its height"
        if wish.min_aspect is not None and width / height < wish.min_aspect:
            return _reason("aspect", aspect, "min_aspect", wish)
        if wish.max_aspect is not None and width / height > wish.max_aspect:
            return _reason("aspect", aspect, "max_aspect", wish)
        return None

    def _of_caption(self, fields: dict[str, Any]) -> Reason | None:
        wish, chars = self.wish, len(fields.get("caption") or fields.get("tags") or "")
        said = f"its caption has {chars:,} characters"
        if wish.min_caption_chars is not None and chars < wish.min_caption_chars:
            return _reason("caption length", said, "min_caption_chars", wish)
        if wish.max_caption_chars is not None and chars > wish.max_caption_chars:
            return _reason("caption length", said, "max_caption_chars", wish)
        return None

    def _of_tags(self, fields: dict[str, Any]) -> Reason | None:
        include, exclude = self.wish.tags_include, self.wish.tags_exclude
        if not include and not exclude:
            return None
        tags = frozenset(self.separators.split(fields))
        if include and tags.isdisjoint(include):
            return Reason("tags", "has none of the tags of data.filters.tags_include")
        unwanted = next((tag for tag in exclude if tag in tags), None)
        if unwanted is None:
            return None
        return Reason("tags", f"has the tag {unwanted}, which data.filters.tags_exclude names")

    def _of_score(self, key: str, fields: dict[str, Any]) -> Reason | None:
        wish, score = self.wish, fields.get("score")
        if (wish.min_score is None and wish.max_score is None) or key.partition("/")[0] not in self._scored:
            return None
        name = "max_score" if wish.min_score is None else "min_score"
        if score is None:
            return _reason("score", "has no score", name, wish)
        if wish.min_score is not None and score < wish.min_score:
            return _reason("score", f"its score is {score:g}", "min_score", wish)
        if wish.max_score is not None and score > wish.max_score:
            return _reason("score", f"its score is {score:g}", "max_score", wish)
        return None


def _reason(name: str, said: str, field: str, wish: FiltersConfig) -> Reason:
    return Reason(name, f"{said}; data.filters.{field} = {getattr(wish, field)}")

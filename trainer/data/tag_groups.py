"""Groups of tags that keep a place of their own among the tags of an image, such as those of quality or of artists.

A group's tags are dropped together or not at all, and never one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from trainer.keyed import draw_words

Place = Literal["first", "last"]


@dataclass(frozen=True)
class TagGroup:
    """Tags that belong together; the fields are those of the configuration's `captions.tag_groups`."""

    name: str
    tags: tuple[str, ...]
    keep: Place = "first"
    dropout: float = 0.0
    take: int | None = None

    @cached_property
    def members(self) -> frozenset[str]:
        """The tags, to look one up."""
        return frozenset(self.tags)

    @property
    def is_random(self) -> bool:
        """Whether a draw may leave some of it out."""
        return self.dropout > 0 or self.take is not None


def taken_out(
    tags: Sequence[str], groups: Sequence[TagGroup], seed: int | None
) -> tuple[dict[Place, list[str]], list[str]]:
    """Take the tags of groups out of an image's tags, and choose among them.

    Args:
        tags: of one image, in their order.
        seed: of this draw; None: nothing is dropped, and of more than `take` tags the first are used.

    Returns:
        What is used of the groups by place, group after group and each in the order of the image; and all other tags.
    """
    placed: dict[Place, list[str]] = {"first": [], "last": []}
    others = [*tags]
    for group in groups:
        members = group.members
        if found := [tag for tag in others if tag in members]:
            placed[group.keep] += _chosen(found, group, seed)
            others = [tag for tag in others if tag not in members]
    return placed, others


def _chosen(found: list[str], group: TagGroup, seed: int | None) -> list[str]:
    """What one draw uses of an image's tags of a group."""
    take = len(found) if group.take is None else group.take
    if seed is None or not group.is_random:
        return found[:take]
    dropout, *draws = draw_words(seed, b"tag group " + group.name.encode(), 1 + len(found))
    if dropout < group.dropout * 2**32:
        return []
    chosen = sorted(range(len(found)), key=draws.__getitem__)[:take]
    return [found[i] for i in sorted(chosen)]

"""What is found of a listed item, and what it is compared with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from trainer.data.buckets import Bucket
from trainer.data.catalog.catalog import BadRow, CatalogRow, FileStamp, Payload
from trainer.data.catalog.changes import Update
from trainer.data.catalog.filters import Filters, Reason
from trainer.data.catalog.settings import PrepareSettings
from trainer.data.sources.sidecars import PLAIN_TEXT, Sidecars
from trainer.data.sources.source import SourceItem
from trainer.data.store.moves import Move, moved


@dataclass(frozen=True)
class Replaced:
    """Another image in the place of one that the catalogue has; or one that cannot be used."""

    by: "CatalogRow | BadRow | LeftOut"

    @property
    def key(self) -> str:
        """That of both."""
        return self.by.row.key if isinstance(self.by, LeftOut) else self.by.key


@dataclass(frozen=True)
class LeftOut:
    """An image that would be a new row, but that a filter leaves out."""

    row: CatalogRow
    reason: Reason


@dataclass(frozen=True)
class KnownLeftOut:
    """One that is a row, with what has changed of it."""

    key: str
    reason: Reason
    update: Update | None


@dataclass(frozen=True)
class StillLeftOut:
    """One that was left out before; for another reason, if there is one here."""

    key: str
    reason: Reason | None


Verdict = CatalogRow | BadRow | Update | Replaced | LeftOut | KnownLeftOut | StillLeftOut | str
"""A new row, a bad one, what has changed of one that the catalogue has; one that is left out; or `known` or `bad` for
what it has."""


@dataclass(frozen=True)
class Known:
    """What the catalogue holds under a key."""

    place: tuple[str, int]
    stamp: FileStamp
    payload: Payload
    repeats: int
    split: str
    content: int | None
    is_lossy: int
    """Whether its caption holds U+FFFD, as one does that was not UTF-8 when nothing else could be read."""
    original_hw: tuple[int, int] = (0, 0)
    """Only where there are filters."""
    caption: str = ""
    """Only where filters read it."""


@dataclass(frozen=True)
class Rules:
    """What decides a row, but for the item."""

    settings: PrepareSettings
    buckets: tuple[Bucket, ...]
    moves: tuple[Move, ...] = ()
    """Places of sources that are others now than when the set was prepared."""
    sidecars: Mapping[str, Sidecars] = field(default_factory=dict)
    """How the files beside images are read, by the name of each source that has more than a text."""

    def sidecars_of(self, item: SourceItem) -> Sidecars:
        """How the files beside this image are read."""
        return self.sidecars.get(item.key.partition("/")[0], PLAIN_TEXT) if self.sidecars else PLAIN_TEXT

    @cached_property
    def filters(self) -> Filters:
        """Those that are judged image by image."""
        return Filters(self.settings.filters, self.settings.separators, self.settings.sources)

    def is_moved(self, before: tuple[str, int], now: tuple[str, int]) -> bool:
        """Whether what lies `now` at a file and offset is what lay there before, in a source that was moved as a
        whole."""
        return before[1] == now[1] and moved(before[0], self.moves) == now[0]

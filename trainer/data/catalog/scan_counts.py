"""What a scan of the sources has found, in numbers."""

from collections import Counter
from dataclasses import dataclass, field

from trainer.data.catalog.judge import LOST
from trainer.data.sources.source import ForeignText


@dataclass
class ScanCounts:
    """What a scan found, in images.

    Attributes:
        known: as they were, or with another caption, key or place, or seen more or less often.
        captions: known ones whose caption or tags are others.
        repeats: known ones that are seen more or less often.
        moved: known ones that lie elsewhere.
        renamed: known under another key.
        back: that had been removed once.
        changed: in the place of another one of the same key; encoded anew.
        removed: not listed any more.
        kept: the same, but they stay; `first_kept` is the path of one.
        filtered: left out, by filter.
    """

    listed: int = 0
    new: int = 0
    known: int = 0
    captions: int = 0
    repeats: int = 0
    moved: int = 0
    renamed: int = 0
    back: int = 0
    changed: int = 0
    removed: int = 0
    kept: int = 0
    first_kept: str = ""
    bad: int = 0
    filtered: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    foreign: dict[str, tuple[int, str]] = field(default_factory=dict)
    """By the encoding as which captions were read that are not UTF-8: how many, and where one of them lies."""
    lossy: tuple[int, str] = (0, "")
    """New captions and known ones that hold U+FFFD, in place of what was lost: how many, and an image."""

    def note_foreign(self, foreign: ForeignText | None) -> None:
        """Count a caption that was read."""
        if foreign is not None:
            count, example = self.foreign.get(foreign.encoding, (0, foreign.place))
            self.foreign[foreign.encoding] = count + 1, example

    def note_lossy(self, caption: str, path: str) -> None:
        """Count a caption that was read."""
        if LOST in caption:
            self.lossy = self.lossy[0] + 1, self.lossy[1] or path

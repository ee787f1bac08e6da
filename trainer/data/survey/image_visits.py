"""How training will see one image in some epochs: how often, with which text, crop and mirroring."""

from dataclasses import dataclass

import numpy as np

from trainer.data.augment import Augmentation, View, draw_view
from trainer.data.buckets import Placement
from trainer.data.captions import CaptionRules, compose
from trainer.data.mixture import Mixture
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.image_lookup import StoredImage
from trainer.keyed import draw_seed

_ROWS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Visit:
    """One time that an epoch, counted from 0, takes the image; `view` where it is decoded anew each time."""

    epoch: int
    repeat: int
    text: str
    view: View | None


def visits(
    prepared: PreparedSet,
    image: StoredImage,
    epoch: int,
    seed: int,
    rules: CaptionRules,
    augmentation: Augmentation,
    centred: Placement | None,
) -> list[Visit]:
    """Those of one epoch, for an image of the training split: exactly what the readers draw.

    Args:
        epoch: counted from 0.
        centred: of an image that is decoded anew at each visit.
    """
    found = []
    for repeat in _repeats(prepared, image, epoch, seed):
        caption_seed = draw_seed(seed, "caption", epoch, image.key, repeat) if rules.is_random else 0
        view = None
        if centred is not None:
            view = draw_view(centred, augmentation, draw_seed(seed, "augment", epoch, image.key, repeat))
        found.append(Visit(epoch, repeat, compose(image.record.caption, rules, caption_seed, epoch), view))
    return found


def _repeats(prepared: PreparedSet, image: StoredImage, epoch: int, seed: int) -> list[int]:
    """Which of its repeats an epoch takes; more of them than it has where its source is taken more than once."""
    mixture = Mixture.of(prepared, seed)
    if not mixture.sources:
        return list(range(image.repeats))
    bucket, found = image.shard.bucket_index, []
    rows = mixture.rows(epoch)[bucket]
    for begin in range(0, rows, _ROWS_AT_ONCE):
        ids = np.arange(begin, min(begin + _ROWS_AT_ONCE, rows), dtype=np.int64)
        stored, further = mixture.stored(epoch, bucket, ids)
        mine = (stored >= image.first_row) & (stored < image.first_row + image.repeats)
        found += (stored[mine] - image.first_row + further[mine]).tolist()
    return sorted(found)

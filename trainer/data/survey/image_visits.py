"""How training will see one image in some epochs: how often, with which text, crop and mirroring."""

from dataclasses import dataclass

from trainer.data.augment import Augmentation, View, draw_view
from trainer.data.buckets import Bucket, Placement, place_into
from trainer.data.captions import CaptionRules, compose
from trainer.data.mixture import Mixture
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.image_lookup import StoredImage
from trainer.keyed import draw_seed


@dataclass(frozen=True)
class Visit:
    """One time that an epoch, counted from 0, takes the image.

    Attributes:
        view: where it is decoded anew each time.
        bucket: another than the image's at another resolution.
    """

    epoch: int
    repeat: int
    text: str
    view: View | None
    bucket: Bucket


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
    buckets, original_h, original_w = prepared.buckets("train"), *image.record.sizes[:2].tolist()
    for bucket, repeat in _repeats(prepared, image, epoch, seed):
        caption_seed = draw_seed(seed, "caption", epoch, image.key, repeat) if rules.is_random else 0
        view = None
        if centred is not None:
            is_main = bucket == image.shard.bucket_index
            placed = centred if is_main else place_into((original_h, original_w), buckets[bucket])
            view = draw_view(placed, augmentation, draw_seed(seed, "augment", epoch, image.key, repeat))
        found.append(
            Visit(epoch, repeat, compose(image.record.caption, rules, caption_seed, epoch), view, buckets[bucket])
        )
    return found


def _repeats(prepared: PreparedSet, image: StoredImage, epoch: int, seed: int) -> list[tuple[int, int]]:
    """In which bucket, and which of its repeats, an epoch takes it; more of them than it has where its source is taken
    more than once."""
    mixture = Mixture.of(prepared, seed)
    if not mixture.pools:
        return [(image.shard.bucket_index, repeat) for repeat in range(image.repeats)]
    return mixture.visits(epoch, image.shard.bucket_index, image.first_row, image.repeats)

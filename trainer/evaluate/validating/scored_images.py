"""Losses image by image: gathered from all workers, and put together by timestep, bucket and source."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.data.loader import Batch
from trainer.evaluate.validating.intervals import Estimate, mean_of


@dataclass(frozen=True)
class ScoredImage:
    """One image and its loss at each timestep.

    Attributes:
        bucket: width and height in pixels.
        copies: how often it was among the rows that were scored, for its repeats.
        losses: in the order of the timesteps.
    """

    key: str
    bucket: tuple[int, int]
    copies: float
    losses: tuple[float, ...]

    @property
    def source(self) -> str:
        """The name of the source, with which the keys of its images begin."""
        return self.key.partition("/")[0]

    @property
    def loss(self) -> float:
        """The mean over the timesteps."""
        return sum(self.losses) / len(self.losses)


def rows_of_batch(batch: Batch, losses: Sequence[Sequence[float]], pixels_per_latent: int = 8) -> list[list[Any]]:
    """What JSON can carry of a batch's images that could be read: key, width, height, weight, loss at each timestep.

    Args:
        losses: [timesteps][m].
    """
    assert batch.latents is not None, "images are encoded before they come here"
    height, width = (pixels_per_latent * side for side in batch.latents.shape[2:])
    weights = batch.weights.tolist()
    return [
        [key, width, height, weight, *(of_timestep[i] for of_timestep in losses)]
        for i, (key, weight) in enumerate(zip(batch.keys, weights, strict=True))
        if weight > 0
    ]


def images_of(rows: Sequence[Sequence[Any]]) -> tuple[ScoredImage, ...]:
    """Each image once, by key; of one that comes several times, its first losses."""
    found: dict[str, ScoredImage] = {}
    for key, width, height, weight, *losses in rows:
        known = found.get(key)
        copies = weight + (known.copies if known else 0.0)
        found[key] = ScoredImage(key, (width, height), copies, known.losses if known else tuple(losses))
    return tuple(found[key] for key in sorted(found))


def over(images: Sequence[ScoredImage], value: Callable[[ScoredImage], float]) -> Estimate:
    """The mean of `value` over images."""
    return mean_of([value(image) for image in images], [image.copies for image in images])


def by_timestep(images: Sequence[ScoredImage], timesteps: Sequence[int]) -> dict[int, Estimate]:
    """The loss at each timestep."""
    return {t: over(images, lambda image, i=i: image.losses[i]) for i, t in enumerate(timesteps)}


def by_bucket(images: Sequence[ScoredImage]) -> dict[str, Estimate]:
    """The loss, over all timesteps, of each bucket such as `832x1216`, wide ones last."""
    buckets = sorted({image.bucket for image in images}, key=lambda bucket: (bucket[0] / bucket[1], bucket))
    return {
        f"{width}x{height}": over([image for image in images if image.bucket == (width, height)], _loss)
        for width, height in buckets
    }


def by_source(images: Sequence[ScoredImage]) -> dict[str, Estimate]:
    """The loss, over all timesteps, of each source, by name."""
    names = sorted({image.source for image in images})
    return {name: over([image for image in images if image.source == name], _loss) for name in names}


def _loss(image: ScoredImage) -> float:
    return image.loss

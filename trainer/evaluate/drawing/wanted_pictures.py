"""What is to be drawn: every image with all of its settings, and which worker draws it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.config.sections.samples_config import SampleImageConfig, SamplerName, SamplesConfig, ScheduleName
from trainer.data.buckets import Bucket
from trainer.data.captions import CaptionRules, compose
from trainer.data.sampler import pick_rows
from trainer.data.store.snapshot import PreparedSet


@dataclass(frozen=True)
class Picture:
    """One image to draw, and the prepared image it is to be compared with, if any."""

    prompt: str
    negative_prompt: str
    bucket: Bucket
    seed: int
    steps: int
    guidance_scale: float
    sampler: SamplerName
    schedule: ScheduleName
    latents: np.ndarray | None = None  # [4, h, w] float16, unscaled
    pixels: np.ndarray | None = None  # [3, H, W] uint8, where the data are images

    @property
    def cost(self) -> int:
        """Grows with the time that it takes to draw."""
        passes = 2 if self.guidance_scale > 1 else 1
        return passes * self.steps * self.bucket.height_px * self.bucket.width_px


def wanted_pictures(
    samples: SamplesConfig, side_px: int, prepared: PreparedSet, captions: CaptionRules
) -> list[Picture]:
    """Those that the section asks for; where it names none, captions of the prepared data in the shape of their image.

    Args:
        side_px: of an image of which nothing else is said.
        captions: without what is random in them.
    """
    images = [*(SampleImageConfig(prompt=prompt) for prompt in samples.prompts), *samples.images]
    bucket = Bucket(samples.height_px or side_px, samples.width_px or side_px)
    if images:
        return [_picture(samples, image, bucket, place) for place, image in enumerate(images)]
    found, buckets = list[Picture](), prepared.buckets("train")
    for bucket_index, row in pick_rows(prepared.rows_per_bucket("train"), samples.count):
        rows, of_row = prepared.read("train", bucket_index, np.array([row])), buckets[bucket_index]
        if not rows.ok[0]:
            continue
        latents, pixels = (None if stack is None else stack[0] for stack in (rows.latents, rows.pixels))
        bucket = Bucket(samples.height_px or of_row.height_px, samples.width_px or of_row.width_px)
        image = SampleImageConfig(prompt=compose(rows.captions[0], captions, 0, 0))
        found.append(_picture(samples, image, bucket, len(found), latents, pixels))
    return found


def _picture(
    samples: SamplesConfig,
    image: SampleImageConfig,
    bucket: Bucket,
    place: int,
    latents: np.ndarray | None = None,
    pixels: np.ndarray | None = None,
) -> Picture:
    sampler = image.sampler or samples.sampler
    negative, scale = image.negative_prompt, image.guidance_scale
    return Picture(
        prompt=image.prompt,
        negative_prompt=samples.negative_prompt if negative is None else negative,
        bucket=Bucket(image.height_px or bucket.height_px, image.width_px or bucket.width_px),
        seed=samples.seed + place if image.seed is None else image.seed,
        steps=image.steps or samples.steps,
        guidance_scale=samples.guidance_scale if scale is None else scale,
        sampler=sampler,
        schedule=(image.schedule or samples.schedule) if sampler == "dpmpp_2m" else "normal",
        latents=latents,
        pixels=pixels,
    )


def dealt_out(costs: Sequence[int], workers: int) -> list[int]:
    """Which worker draws each image: the dearest first, each to who has least to do, so that all end at nearly the same
    time. Where all cost the same, they are dealt out in turn."""
    load, drawn_by = [0] * workers, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda i: -costs[i]):
        drawn_by[number] = min(range(workers), key=load.__getitem__)
        load[drawn_by[number]] += costs[number]
    return drawn_by

"""Quality scores of a set of weights: draw an image for each caption, and compare it with the data's own."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from trainer.data.captions import compose
from trainer.data.sampler import pick_rows
from trainer.evaluate.drawing.draw import image_name
from trainer.evaluate.quality.clip_features import ClipFeatures
from trainer.evaluate.quality.clip_folder import read_clip_folder
from trainer.evaluate.quality.quality_scores import QualityScores, quality_scores
from trainer.evaluate.sampling import decoded_images
from trainer.evaluate.scoring import Scorer
from trainer.evaluate.validating.intervals import Estimate
from trainer.guards import DEFAULT_LIMITS, Limits
from trainer.parallel.comm import broadcast_object, failing_together, gather_objects
from trainer.raster import open_image

_SEEDS = 1 << 32


@dataclass(frozen=True)
class QualityWish:
    """What `eval --quality` asks for: the folder of a CLIP model, and how many images are drawn, at least 2."""

    clip_folder: Path
    num_images: int

    @staticmethod
    def from_json(options: dict[str, Any] | None) -> "QualityWish | None":
        """As the command hands it to the workers."""
        return QualityWish(Path(options["clip_folder"]), options["num_images"]) if options else None


class _Reference(NamedTuple):
    """An image of the data: its place, and its caption."""

    bucket: int
    row: int
    prompt: str


def score_quality(
    scorer: Scorer, wish: QualityWish, out_dir: Path, weights: str, limits: Limits = DEFAULT_LIMITS
) -> list[str]:
    """Draw images for captions of held-out images, or of others where none are held out, each in its bucket's size,
    into `out_dir/quality`, and write `out_dir/quality.json`. Every worker takes its share.

    Args:
        weights: the name of what draws, such as `step-00000120-ema`.

    Returns:
        Lines that tell it.

    Raises:
        FailedBeside: (on every worker) one of them could not.
    """
    split = "validation" if sum(scorer.prepared.rows_per_bucket("validation")) else "train"
    with failing_together(scorer.comm):
        found = _references(scorer, split, wish.num_images) if scorer.comm.rank == 0 else []
    references = [_Reference(*reference) for reference in broadcast_object(scorer.comm, found)]
    # What is loaded once serves the images of all buckets.
    loads = {name: cache(getattr(scorer, name)) for name in ("load_tokenizer", "load_text_encoders", "load_vae")}
    drawing = replace(scorer, **loads)
    files = _draw(drawing, split, references, out_dir / "quality", weights)
    with failing_together(scorer.comm):
        clip = ClipFeatures(read_clip_folder(wish.clip_folder, limits), scorer.comm.device, limits)
        share = _features(drawing, clip, split, references, files)
    rows = sorted((row for part in gather_objects(scorer.comm, share) for row in part), key=lambda row: row[0])
    if len(rows) < 2:
        return [f"quality: {len(rows)} images with captions could be read; two are needed"]
    drawn, data, texts = (np.array([row[column] for row in rows]) for column in (1, 2, 3))
    scores = quality_scores(drawn, data, texts)
    if scorer.comm.rank == 0:
        record = _record(scores, wish, split)
        (out_dir / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    return _told(scores, split)


def _references(scorer: Scorer, split: str, count: int) -> list[_Reference]:
    """Of different images, spread evenly over all."""
    found: dict[str, _Reference] = {}
    for bucket, row in pick_rows(scorer.prepared.rows_per_bucket(split), count):
        record = scorer.prepared.read_record(split, bucket, row)
        if record is not None:
            found.setdefault(record.key, _Reference(bucket, row, compose(record.caption, scorer.captions, 0, 0)))
    return list(found.values())


def _draw(scorer: Scorer, split: str, references: Sequence[_Reference], folder: Path, weights: str) -> list[Path]:
    """The file of each reference's drawing, bucket by bucket."""
    files: list[Path] = []
    settings, buckets = scorer.samples, scorer.prepared.buckets(split)
    way = "zeros" if settings.unconditional == "zeros" else "empty_text"
    for bucket_index, group in groupby(references, key=lambda reference: reference.bucket):
        prompts, bucket = [reference.prompt for reference in group], buckets[bucket_index]
        size = {"width_px": bucket.width_px, "height_px": bucket.height_px}
        own = {"prompts": prompts, "images": [], "unconditional": way, "seed": (settings.seed + len(files)) % _SEEDS}
        place = folder / f"{bucket.width_px}x{bucket.height_px}"
        replace(scorer, samples=settings.model_copy(update=own | size)).draw(place, weights)
        files += [place / image_name(index, len(prompts), way, [way]) for index in range(len(prompts))]
    return files


def _features(
    scorer: Scorer, clip: ClipFeatures, split: str, references: Sequence[_Reference], files: Sequence[Path]
) -> list[list[Any]]:
    """Of this worker's share: number, and features of the drawing, of the data's image and of the caption."""
    rows, batch = [], 8
    share = [*range(scorer.comm.rank, len(references), scorer.comm.world)]
    for begin in range(0, len(share), batch):
        numbers, drawn, data = [], [], []
        for number in share[begin : begin + batch]:
            image = _image_of(scorer, split, references[number])
            if image is not None:
                numbers.append(number)
                data.append(image)
                drawn.append(_read(files[number]))
        if numbers:
            texts = clip.of_texts([references[number].prompt for number in numbers])
            parts = clip.of_images(drawn).tolist(), clip.of_images(data).tolist(), texts.tolist()
            rows += [list(row) for row in zip(numbers, *parts, strict=True)]
    return rows


def _image_of(scorer: Scorer, split: str, reference: _Reference) -> Image.Image | None:
    """As it is trained on: its pixels, or its latents through the VAE; None of one that cannot be read."""
    import torch

    rows = scorer.prepared.read(split, reference.bucket, np.array([reference.row]))
    if not rows.ok[0]:
        return None
    if rows.pixels is not None:
        return Image.fromarray(rows.pixels[0].transpose(1, 2, 0))
    assert rows.latents is not None
    return decoded_images(scorer.load_vae(), torch.from_numpy(rows.latents))[0]


def _read(path: Path) -> Image.Image:
    with open_image(path) as image:
        return image.convert("RGB")


def _record(scores: QualityScores, wish: QualityWish, split: str) -> dict[str, Any]:
    def plain(estimate: Estimate) -> dict[str, float | None]:
        return {"mean": estimate.mean, "plus_minus": estimate.half_width}

    return {
        "clip_model": str(wish.clip_folder),
        "captions_of": "held-out images" if split == "validation" else "images that are trained on",
        "images": scores.images,
        "clip_score": plain(scores.clip_score),
        "clip_score_of_data": plain(scores.clip_score_of_data),
        "cmmd": scores.cmmd,
        "kid_of_clip_features": scores.kid,
    }


def _told(scores: QualityScores, split: str) -> list[str]:
    def told(estimate: Estimate) -> str:
        return f"{estimate.mean:.2f}" + ("" if estimate.half_width is None else f" ± {estimate.half_width:.2f}")

    whose = "held-out images" if split == "validation" else "images that are trained on"
    return [
        f"quality, {scores.images} images drawn for captions of {whose}:",
        f"  CLIP score {told(scores.clip_score)}; of the data's own images {told(scores.clip_score_of_data)}",
        f"  CMMD {scores.cmmd:.3f}, KID of CLIP features {scores.kid:.5f}; 0: drawn as the data",
    ]

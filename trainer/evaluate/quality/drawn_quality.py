"""Quality scores of a set of weights: draw an image for each caption, and compare it with the data's own."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.data.captions import compose
from trainer.data.sampler import pick_rows
from trainer.evaluate.drawing.draw import image_name
from trainer.evaluate.drawing.places import sheet_of
from trainer.evaluate.quality.clip_features import ClipFeatures
from trainer.evaluate.quality.clip_folder import read_clip_folder
from trainer.evaluate.quality.feature_model import FeatureModel, read_feature_model
from trainer.evaluate.quality.image_features import ImageFeatures
from trainer.evaluate.quality.quality_scores import scores_by_clip, scores_by_features
from trainer.evaluate.quality.told_quality import clip_lines, clip_record, distance_lines, distance_record
from trainer.evaluate.sampling import decoded_images
from trainer.evaluate.scoring import Scorer
from trainer.guards import DEFAULT_LIMITS, Limits
from trainer.parallel.comm import broadcast_object, done_by_first, failing_together, gather_tensors
from trainer.raster import open_image

_SEEDS = 1 << 32
_MOST_ON_A_SHEET = 256  # images, and in one folder
_BATCH = 16


@dataclass(frozen=True)
class QualityWish:
    """What `eval --quality --fid` asks for; one of the two models at least.

    Attributes:
        clip_folder: of a CLIP model, for CLIP score, CMMD and KID of its features.
        feature_model: Inception's weights or a DINOv2 folder, for Fréchet's distance and KID.
        num_images: how many are drawn, at least 2.
    """

    clip_folder: Path | None
    feature_model: Path | None
    num_images: int

    @staticmethod
    def from_json(options: dict[str, Any] | None) -> "QualityWish | None":
        """As the command hands it to the workers."""
        if not options:
            return None
        clip, model = options.get("clip_folder"), options.get("feature_model")
        return QualityWish(Path(clip) if clip else None, Path(model) if model else None, options["num_images"])


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
        device, folder = scorer.comm.device, wish.clip_folder
        clip = ClipFeatures(read_clip_folder(folder, limits), device, limits) if folder else None
        model = read_feature_model(wish.feature_model, limits) if wish.feature_model else None
        images = ImageFeatures(model, device, limits) if model else None
        own = _share_of_features(drawing, clip, images, split, references, files)
    gathered = {name: gather_tensors(scorer.comm, torch.from_numpy(part)) for name, part in own.items()}

    def finish() -> list[str]:
        _remove_others(out_dir / "quality", {file.parent for file in files})
        return _told_and_written(gathered, wish, model, split, out_dir)

    return done_by_first(scorer.comm, finish)


def _remove_others(folder: Path, drawn: set[Path]) -> None:
    """What an earlier and larger measurement has left would look like a part of this one."""
    keep = drawn | {sheet_of(place) for place in drawn}
    for other in set(folder.iterdir()) - keep:
        if other.is_dir():
            shutil.rmtree(other)
        else:
            other.unlink()


def _told_and_written(
    gathered: dict[str, Tensor], wish: QualityWish, model: FeatureModel | None, split: str, out_dir: Path
) -> list[str]:
    """On rank 0: scores of all images, written down."""
    rows = gathered["row"]
    order = torch.argsort(rows)[int((rows < 0).sum()) :]  # the same for any number of workers
    found = {name: part[order].numpy() for name, part in gathered.items()}
    if len(order) < 2:
        return [f"quality: {len(order)} images with captions could be read; two are needed"]
    whose = "held-out images" if split == "validation" else "images that are trained on"
    record: dict[str, Any] = {"captions_of": whose, "images": len(order)}
    told = [f"quality, {len(order):,} images drawn for captions of {whose}, beside those images:"]
    if wish.clip_folder:
        scores = scores_by_clip(found["clip_drawn"], found["clip_data"], found["clip_text"])
        record |= clip_record(scores, wish.clip_folder)
        told += clip_lines(scores)
    if model:
        distances = scores_by_features(found["drawn"], found["data"])
        record |= distance_record(distances, model)
        told += distance_lines(distances, model, len(order))
    (out_dir / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    return told


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
        for begin in range(0, len(prompts), _MOST_ON_A_SHEET):
            some, number = prompts[begin : begin + _MOST_ON_A_SHEET], begin // _MOST_ON_A_SHEET + 1
            own = {"prompts": some, "images": [], "unconditional": way, "seed": (settings.seed + len(files)) % _SEEDS}
            place = folder / (f"{bucket.width_px}x{bucket.height_px}" + (f"-{number}" if number > 1 else ""))
            replace(scorer, samples=settings.model_copy(update=own | size)).draw(place, weights)
            files += [place / image_name(index, len(some), way, [way]) for index in range(len(some))]
    return files


def _share_of_features(
    scorer: Scorer,
    clip: ClipFeatures | None,
    images: ImageFeatures | None,
    split: str,
    references: Sequence[_Reference],
    files: Sequence[Path],
) -> dict[str, np.ndarray]:
    """Of this worker's share: `row`, the number of the reference, -1 where there is none, and features of the drawing,
    of the data's image and of the caption; as many rows on each worker."""
    world, count = scorer.comm.world, len(references)
    found: dict[str, np.ndarray] = {"row": np.full(-(-count // world), -1)}
    for name, size in _sizes(clip, images).items():
        found[name] = np.zeros((len(found["row"]), size), dtype=np.float32)
    share, place = [*range(scorer.comm.rank, count, world)], 0
    for begin in range(0, len(share), _BATCH):
        read = [(number, _image_of(scorer, split, references[number])) for number in share[begin : begin + _BATCH]]
        numbers, data = [number for number, image in read if image], [image for _, image in read if image]
        if not numbers:
            continue
        drawn, rows = [_read(files[number]) for number in numbers], slice(place, place + len(numbers))
        found["row"][rows], place = numbers, rows.stop
        if clip:
            found["clip_drawn"][rows], found["clip_data"][rows] = clip.of_images(drawn), clip.of_images(data)
            found["clip_text"][rows] = clip.of_texts([references[number].prompt for number in numbers])
        if images:
            found["drawn"][rows], found["data"][rows] = images.of_images(drawn), images.of_images(data)
    return found


def _sizes(clip: ClipFeatures | None, images: ImageFeatures | None) -> dict[str, int]:
    """Of the features of one image or text, by what they are of."""
    sizes: dict[str, int] = {}
    if clip:
        sizes |= {"clip_drawn": clip.size, "clip_data": clip.size, "clip_text": clip.size}
    if images:
        sizes |= {"drawn": images.size, "data": images.size}
    return sizes


def _image_of(scorer: Scorer, split: str, reference: _Reference) -> Image.Image | None:
    """As it is trained on: its pixels, or its latents through the VAE; None of one that cannot be read."""
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

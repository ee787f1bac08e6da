"""`sdxl-train data show`: all that is known of one image, and how the next epochs will see it."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoint.run_dir import list_checkpoints, read_state
from trainer.cli.start_workers import count_run_tags
from trainer.config.load import load_config
from trainer.config.schema import Config
from trainer.data.augment import Augmentation
from trainer.data.buckets import Bucket, source_box
from trainer.data.catalog.catalog import open_catalog
from trainer.data.sources.source import ROW, WHOLE
from trainer.data.store.snapshot import PreparedSet
from trainer.data.survey.browse.gallery import ImagePlace, find_image
from trainer.data.survey.image_lookup import StoredImage, find_stored
from trainer.data.survey.image_visits import Visit, visits
from trainer.errors import UserError, printable
from trainer.model.text import CaptionTokenizer
from trainer.model_files.model_source import find_source
from trainer.model_files.tokenizer_files import tokenizer_folders
from trainer.train.caption_rules import caption_rules, run_loss_weights, tokenizers_for

_MOST_EPOCHS, _MOST_VISITS = 1000, 20
_LONGEST = 4000


def show(argv: Sequence[str]) -> int:
    """Say of one image where its file is, how it is cropped, what is stored of it, and which captions and tokens the
    next epochs of the run will train it with."""
    parser = argparse.ArgumentParser(
        prog="sdxl-train data show",
        description=show.__doc__,
        epilog="example: sdxl-train data show configs/4x3090.yaml photos/IMG_0001",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="the run's configuration")
    parser.add_argument("key", metavar="KEY", help="of the image; the source's name before it may be left out")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the config's")
    parser.add_argument("--epochs", type=int, default=3, metavar="N", help="epochs to tell about (default: 3)")
    arguments = parser.parse_intermixed_args(argv)
    if not 0 <= arguments.epochs <= _MOST_EPOCHS:
        raise UserError(f"--epochs {arguments.epochs}: must be from 0 to {_MOST_EPOCHS}")
    config = load_config(arguments.config, arguments.overrides, check_paths=False)
    prepared = PreparedSet.open(config.data.prepared)
    with ExitStack() as stack:
        catalog = None
        if (prepared.path / "catalog.sqlite").is_file():
            catalog = stack.enter_context(open_catalog(prepared.path, read_only=True))
        image = find_stored(prepared, catalog, arguments.key)
        place, path, _ = find_image(image.record, image.bucket, catalog)
    lines = [
        *_about(image),
        *_file(place, path),
        *_crop(image, place),
        *_stored(prepared, image),
        *_caption(config, prepared, image),
    ]
    for name, text in lines:
        print(f"{name:<12}{printable(text, _LONGEST)}")
    for line in _epochs(config, prepared, image, place, arguments.epochs):
        print(printable(line, _LONGEST))
    return 0


def _about(image: StoredImage) -> Iterator[tuple[str, str]]:
    yield "key", image.key
    held = "" if image.shard.split == "train" else ", held out: it is never trained"
    yield "split", f"{image.shard.split}{held}"
    yield "bucket", f"{image.bucket.width_px} x {image.bucket.height_px} px"
    yield "repeats", f"{image.repeats}"


def _file(place: ImagePlace | None, path: str) -> Iterator[tuple[str, str]]:
    if not path:
        yield "file", "not known: the set has no catalogue"
        return
    part = ""
    if place is not None and place.length == ROW:
        yield "file", f"{path}, row {place.offset:,} of the table"
        return
    if place is not None and place.length != WHOLE:
        part = f", {place.length:,} bytes from byte {place.offset:,} on"
    try:
        size = f"{os.stat(path).st_size:,} bytes"  # noqa: PTH116 - may hold what no Path does
    except (OSError, ValueError) as error:
        size = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    yield "file", f"{path} ({size}){part}"


def _crop(image: StoredImage, place: ImagePlace | None) -> Iterator[tuple[str, str]]:
    original_h, original_w, top, left, target_h, target_w = image.record.sizes.tolist()
    if place is not None:
        (height, width), placement = place.original_hw, place.placement
        box_top, box_left, bottom, right = source_box(place.original_hw, placement)
        kept = (bottom - box_top) * (right - box_left) / (height * width)
        yield "image", f"{width} x {height} px as displayed"
        yield (
            "crop",
            f"resized to {placement.resized_hw[1]} x {placement.resized_hw[0]} px, then {target_w} x {target_h} px "
            f"from left {left}, top {top}: {kept:.1%} of the image; in it left {box_left:.0f} to {right:.0f}, top "
            f"{box_top:.0f} to {bottom:.0f} px",
        )
    yield (
        "SDXL sees",
        f"original {original_w} x {original_h}, crop left {left}, top {top}, target {target_w} x {target_h} "
        f"(time ids {original_h} {original_w} {top} {left} {target_h} {target_w})",
    )


def _stored(prepared: PreparedSet, image: StoredImage) -> Iterator[tuple[str, str]]:
    shard = image.shard
    yield "shard", f"{prepared.path / shard.name}, row {image.place:,} of {shard.rows:,}"
    row = np.array([image.first_row])
    rows = prepared.read(shard.split, shard.bucket_index, row, with_masks=prepared.has_masks)
    name = "pixels" if prepared.holds_images else "latents"
    if not rows.ok[0]:
        problem = rows.problems[0]
        yield name, f"cannot be read: {problem.file}: {problem.reason}"
        return
    if rows.latents is not None:
        latents = rows.latents[0].astype(np.float32)
        shape = " x ".join(map(str, latents.shape))
        factor = f", times {prepared.scaling_factor:g} for the UNet" if _has_factor(prepared) else ""
        yield "latents", f"{shape} fp16, sound{factor}"
        stats = [f"{c.mean():.2f} ± {c.std():.2f} ({c.min():.2f} to {c.max():.2f})" for c in latents]
        yield "", f"channels: {'; '.join(stats)}"
    else:
        yield "pixels", "decoded anew at each visit, sound"
    if rows.masks is not None:
        yield "mask", f"{rows.masks[0].mean() / 255:.1%} of the area is trained"


def _has_factor(prepared: PreparedSet) -> bool:
    return "the VAE's scaling_factor" in prepared.settings


def _caption(config: Config, prepared: PreparedSet, image: StoredImage) -> Iterator[tuple[str, str]]:
    fields = json.loads(image.record.caption)
    yield "caption", fields.get("caption") or "(none)"
    if fields.get("tags"):
        yield "tags", fields["tags"]
    if image.shard.split != "train":
        return
    count_run_tags(config)
    weights = run_loss_weights(config, prepared)
    if weights is not None:
        yield "loss weight", f"{weights.weight(image.key, image.record.caption):.4g}"


def _epochs(
    config: Config, prepared: PreparedSet, image: StoredImage, place: ImagePlace | None, epochs: int
) -> Iterator[str]:
    if image.shard.split != "train" or not epochs:
        return
    tokenizer, missing = _tokenizer(config)
    rules = caption_rules(config)
    augment = config.data.augment
    augmentation = Augmentation(augment.flip_probability, augment.random_crop)
    centred = place.placement if place is not None and prepared.holds_images else None
    first, told = _next_epoch(config)
    yield ""
    yield f"in the next {epochs} epochs{told}:"
    if missing:
        yield f"  tokens are not told: {missing}"
    before: tuple[tuple[str, Bucket], ...] = ()
    for epoch in range(first, first + epochs):
        found = visits(prepared, image, epoch, config.run.seed, rules, augmentation, centred)
        texts = tuple((visit.text, visit.bucket) for visit in found)
        yield f"epoch {epoch + 1}: seen {len(found)} time{'' if len(found) == 1 else 's'}"
        if texts and texts == before and not augmentation.random_crop and not augmentation.flip_probability:
            yield "  the same as in the epoch before"
            continue
        before = texts
        for visit in found[:_MOST_VISITS]:
            yield from _visit(visit, image, tokenizer)
        if len(found) > _MOST_VISITS:
            yield f"  and {len(found) - _MOST_VISITS} times more"


def _visit(visit: Visit, image: StoredImage, tokenizer: CaptionTokenizer | None) -> Iterator[str]:
    at = f" (at {visit.bucket.width_px} x {visit.bucket.height_px} px)" if visit.bucket != image.bucket else ""
    yield f"  {visit.text or '(empty)'}{at}"
    if visit.view is not None:
        top, left = visit.view.placement.crop_top_left
        yield f"    crop from left {left}, top {top}{', mirrored' if visit.view.flipped else ''}"
    if tokenizer is None:
        return
    chunks = tokenizer.words_of(visit.text)
    total = sum(map(len, chunks))
    over = total - tokenizer.max_tokens
    cut = f"; the last {over} are beyond the {tokenizer.max_tokens} that are used" if over > 0 else ""
    yield f"    {total} tokens{cut}: {' '.join(word for chunk in chunks[: tokenizer.chunks] for word in chunk)}"


def _tokenizer(config: Config) -> tuple[CaptionTokenizer | None, str]:
    """The run's; or else why there is none."""
    try:
        folders = tokenizer_folders(find_source(config.model.path), config.model.tokenizer)
        return tokenizers_for(config, folders), ""
    except UserError as error:
        return None, error.lines[0]


def _next_epoch(config: Config) -> tuple[int, str]:
    """The epoch, counted from 0, that the run is in or begins with, and from where that is known."""
    newest = list_checkpoints(config.run.dir)[-1:]
    if not newest:
        return 0, ""
    try:
        position: Any = read_state(newest[0])["position"]
        return int(position["epoch"]), f", from checkpoint {newest[0].name} on"
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return 0, ""

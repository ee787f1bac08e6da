"""OneTrainer's concepts, resolutions and captions as this program's `data` and `captions`."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.importing.draft_end import read_text
from trainer.importing.given import Draft
from trainer.importing.onetrainer_settings import number, read_json_text

_CHANGES = ("rotate", "brightness", "contrast", "saturation", "hue")
_SIZE = re.compile(r"(\d+)(?:x(\d+))?")


def data_of_settings(draft: Draft, folder: Path) -> None:
    """Sources, buckets, masks and captions.

    Args:
        folder: of the file with the settings, beside or above which the file of concepts lies.
    Raises:
        UserError: there are no images.
    """
    concepts = [each for each in _concepts(draft, folder) if isinstance(each, dict) and each.get("enabled", True)]
    used = [each for each in concepts if each.get("type", "STANDARD") == "STANDARD"]
    for each in concepts:
        if each not in used:
            kind = str(each.get("type")).lower()
            mend = "data.validation_fraction holds images out" if kind == "validation" else (
                "a source with `prior: true` is the nearest")  # fmt: skip
            draft.notes.append(f"concept {_name(each)}: {kind} is not here, and it is left out; {mend}")
    if not used:
        raise UserError("concepts: none is enabled for training; without one there are no images")
    masked = bool(draft.take("masked_training"))
    texts = [each.get("text") or {} for each in used]
    of_tags = any(text.get("enable_tag_shuffling") or text.get("tag_dropout_enable") for text in texts)
    sources = [_source(draft, each, masked=masked, of_tags=of_tags) for each in used]
    _name_apart(sources)
    draft.put("data.sources", sources, "concepts", "concept_file_name")
    _masks(draft, masked=masked)
    _resolutions(draft)
    _captions(draft, texts, of_tags=of_tags)
    _augmentation(draft, [each.get("image") or {} for each in used])


def _concepts(draft: Draft, folder: Path) -> list[Any]:
    concepts = draft.take("concepts")
    if concepts is None:
        name = Path(str(draft.take("concept_file_name", "training_concepts/concepts.json")))
        places = [place / name for place in (Path(), folder, folder.parent, folder.parent.parent)]
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise UserError(f"concept_file_name = {name}: no such file; start this in its folder, or write its "
                            "list into the settings as `concepts`")  # fmt: skip
        concepts = read_json_text(read_text(found), str(found))
    if not isinstance(concepts, list):
        raise UserError("concepts: must be a list")
    return concepts


def _name(concept: Mapping[str, Any]) -> str:
    return str(concept.get("name") or concept.get("path"))


def _source(draft: Draft, concept: Mapping[str, Any], *, masked: bool, of_tags: bool) -> dict[str, Any]:
    if not concept.get("path"):
        raise UserError(f"concept {concept.get('name') or '?'}: has no path")
    source: dict[str, Any] = {"path": str(concept["path"])}
    if name := concept.get("name"):
        source["name"] = str(name).replace("/", "-").strip()[:100]
    source |= {"caption_files_hold": "tags"} if of_tags else {}
    source |= {"masks": "files"} if masked else {}
    amount = float(concept.get("balancing", concept.get("repeats", 1)))
    if concept.get("balancing_strategy", "REPEATS") == "SAMPLES" and amount >= 1:
        source["per_epoch"] = int(amount)
    elif amount != 1 and amount == int(amount) and amount >= 1:
        source["repeats"] = int(amount)
    elif amount != 1 and amount > 0:
        source["weight"] = amount
    if (weight := float(concept.get("loss_weight", 1))) != 1:
        source["loss_weight"] = weight
    text = concept.get("text") or {}
    if (held := text.get("prompt_source", "sample")) != "sample":
        draft.notes.append(f"concept {_name(concept)}: prompts from {'a single file' if held == 'concept' else held}: "
                           "captions are read from .txt files beside the images")  # fmt: skip
    if not concept.get("include_subdirectories") and _has_folders(str(concept["path"])):
        draft.notes.append(f"concept {_name(concept)}: folders within it are searched too; move out what is not meant")
    return source


def _name_apart(sources: Sequence[dict[str, Any]]) -> None:
    """Concepts may share a name, sources may not."""
    taken: set[str] = set()
    for source in sources:
        if name := source.get("name"):
            further = (f"{name}~{number}" for number in itertools.count(2))
            source["name"] = next(
                each for each in (name, *itertools.islice(further, len(sources))) if each not in taken
            )
            taken.add(source["name"])


def _has_folders(path: str) -> bool:
    try:
        return any(entry.is_dir() for entry in Path(path).expanduser().iterdir())
    except OSError:
        return False


def _masks(draft: Draft, *, masked: bool) -> None:
    options = {"unmasked_probability": ("unmasked_probability", 0.1), "unmasked_weight": ("unmasked_weight", 0.1)}
    if masked:
        draft.put("objective.loss.masked", True, "masked_training")
        for option, (key, usual) in options.items():
            draft.put(f"objective.loss.{key}", number(draft, option, usual), option)
        if draft.take("normalize_masked_area_loss"):
            draft.put("objective.loss.normalize_masked_area", True, "normalize_masked_area_loss")
    for option in (*options, "normalize_masked_area_loss"):
        draft.leave(option, "has no effect without masked_training")


def _resolutions(draft: Draft) -> None:
    """`1024`, `1024x768`, or several with commas, of which each image has one at random."""
    said = str(draft.take("resolution", "512"))
    found = [_SIZE.fullmatch(part.strip()) for part in said.split(",")]
    if not all(found):
        raise UserError(f"resolution = {said}: must be a size in px, or several with commas")
    sides = [round(math.sqrt(int(each[1]) * int(each[2] or each[1]))) for each in found if each]
    step = 64
    rounded = sorted({max(step, round(side / step) * step) for side in sides}, reverse=True)
    if sorted(sides, reverse=True) != rounded:
        draft.notes.append(
            f"resolution = {said}: taken as {', '.join(map(str, rounded))}, of squares in steps of 64 px"
        )
    draft.put("data.buckets.resolution", rounded[0], "resolution")
    if len(rounded) > 1:
        share = round(1 / len(rounded), 4)
        further = [{"resolution": side, "share": share} for side in rounded[1:]]
        draft.put("data.buckets.also_at", further, "resolution")
    if not draft.take("aspect_ratio_bucketing", True):
        draft.put("data.buckets.min_px", rounded[0], "aspect_ratio_bucketing")
        draft.put("data.buckets.max_px", rounded[0])
    draft.leave("aspect_ratio_bucketing", "images always keep their shapes, unless data.buckets says otherwise")


def _captions(draft: Draft, texts: Sequence[Mapping[str, Any]], *, of_tags: bool) -> None:
    if any(text != texts[0] for text in texts):
        draft.notes.append("captions: settings differ between concepts; here they hold for all, as the first has them")
    text = texts[0]
    if of_tags:
        draft.put("captions.use", "tags")
        draft.put("captions.keep_tokens", int(text.get("keep_tags_count", 1)))
        if text.get("enable_tag_shuffling"):
            draft.put("captions.shuffle_tags", True)
        if (separator := str(text.get("tag_delimiter", ","))) not in (",", ""):
            draft.put("captions.tag_separator", separator)
    if text.get("tag_dropout_enable") and (rate := float(text.get("tag_dropout_probability", 0))):
        mode = str(text.get("tag_dropout_mode", "FULL"))
        if mode == "FULL":
            draft.put("captions.dropout_rate", rate)
            draft.notes.append("tag dropout FULL leaves out all but the kept tags: here the whole text is left out")
        else:
            draft.put("captions.tag_dropout_rate", rate)
            if mode != "RANDOM":
                draft.notes.append(f"tag dropout {mode}: here all tags have the same chance")
    if str(text.get("tag_dropout_special_tags_mode", "NONE")) != "NONE":
        draft.notes.append("special tags of the dropout: captions.tag_groups gives tags a chance of their own")
    if text.get("caps_randomize_enable"):
        draft.notes.append("capitals at random: SDXL's tokenizers know none, so that nothing is lost")
    rates = {number(draft, f"{part}.dropout_probability", 0.0) for part in ("text_encoder", "text_encoder_2")}
    rate = max(each or 0.0 for each in rates)
    if rate and "dropout_rate" not in draft.sections.get("captions", {}):
        names = ("text_encoder.dropout_probability", "text_encoder_2.dropout_probability")
        draft.put("captions.dropout_rate", rate, *names)
        if len(rates) > 1:
            draft.notes.append(
                "dropout_probability differs between the text encoders: both get the empty text, or none"
            )


def _augmentation(draft: Draft, images: Sequence[Mapping[str, Any]]) -> None:
    flips = [bool(image.get("enable_random_flip")) for image in images]
    jitter = [image.get("enable_crop_jitter", True) for image in images]
    if any(flips):
        draft.put("data.augment.flip_probability", 0.5)
        draft.put("data.mode", "images", "latent_caching")
        draft.notes.append("random flips: images are encoded anew at each visit (data.mode: images), which costs time "
                           "in each step; without them latents are stored once. They hold for all")  # fmt: skip
    elif not draft.take("latent_caching", True):
        draft.put("data.mode", "images", "latent_caching")
    draft.leave("latent_caching", "latents are always stored once, on disk (data.mode)")
    if any(jitter):
        draft.notes.append("crop jitter: images are cropped in the middle; data.augment.random_crop with data.mode: "
                           "images crops at random")  # fmt: skip
    changed = [what for what in _CHANGES if any(image.get(f"enable_{how}_{what}") for image in images
                                                for how in ("random", "fixed"))]  # fmt: skip
    changed += ["flip of all"] * any(image.get("enable_fixed_flip") for image in images)
    if changed:
        draft.notes.append(f"{', '.join(changed)}: images are not changed so; it trains what they are not")
    if any(image.get("enable_resolution_override") for image in images):
        draft.notes.append("resolution of single concepts: data.buckets.also_at holds all images at several")
    if any(image.get(f"enable_random_{what}") for image in images for what in ("circular_mask_shrink",
                                                                               "mask_rotate_crop")):  # fmt: skip
        draft.notes.append("masks are taken as they are")

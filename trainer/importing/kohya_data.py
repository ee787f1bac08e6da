"""Images, captions and buckets of kohya's options or dataset file, as this program's `data` and `captions`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.config.spelling import nearest
from trainer.errors import UserError
from trainer.importing.given import Draft
from trainer.importing.kohya_options import NOTHING_HERE

_CAPTIONS = {
    "keep_tokens": "keep_tokens", "keep_tokens_separator": "keep_tokens_separator",
    "secondary_separator": "secondary_separator", "enable_wildcard": "wildcards", "caption_prefix": "prefix",
    "caption_suffix": "suffix", "caption_dropout_rate": "dropout_rate",
    "caption_dropout_every_n_epochs": "dropout_every_n_epochs", "caption_tag_dropout_rate": "tag_dropout_rate",
}  # fmt: skip
_OF_TAGS = ("shuffle_caption", "caption_tag_dropout_rate", "keep_tokens_separator", "secondary_separator")
_OF_SOURCES = (
    "train_data_dir", "in_json", "reg_data_dir", "caption_extension", "caption_extention", "dataset_repeats",
    "dataset_config", "alpha_mask", "conditioning_data_dir",
)  # fmt: skip
_SUBSET_KEYS = {
    "image_dir", "metadata_file", "num_repeats", "is_reg", "class_tokens", "caption_extension", "alpha_mask",
    "conditioning_data_dir",
}  # fmt: skip
_FILE_KEYS = {
    *_SUBSET_KEYS, *_CAPTIONS, "subsets", "shuffle_caption", "caption_separator", "flip_aug", "random_crop",
    "batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket", "max_bucket_reso", "min_bucket_reso",
    "resolution", "validation_split",
}  # fmt: skip
_IDLE_FILE_KEYS = {
    name: NOTHING_HERE[name]
    for name in ("color_aug", "face_crop_aug_range", "token_warmup_min", "token_warmup_step", "cache_info",
                 "validation_seed", "network_multiplier", "resize_interpolation")
} | {"custom_attributes": "is of other programs"}  # fmt: skip


def known_dataset_keys() -> set[str]:
    """All that a dataset file may hold, at any of its levels."""
    return {*_FILE_KEYS, *_IDLE_FILE_KEYS}


def check_dataset_keys(draft: Draft, dataset: Mapping[str, Any], place: str) -> None:
    """Note keys of a dataset file that become nothing.

    Raises:
        UserError: a key that sd-scripts does not know, and would refuse as well.
    """
    idle: list[str] = []
    tables = [table for table in (dataset.get("general"), *dataset.get("datasets", [])) if isinstance(table, dict)]
    tables += [subset for table in tables for subset in table.get("subsets", [])]
    for name, value in ((name, value) for table in tables for name, value in table.items()):
        if name in _IDLE_FILE_KEYS:
            idle += [name] if value and name not in idle else []
        elif name not in _FILE_KEYS:
            near = nearest(name, known_dataset_keys())
            raise UserError(f"{place}: {name}: is no key of a dataset file{f'; did you mean {near}?' if near else ''}")
    draft.notes += [f"{place}: {name}: {_IDLE_FILE_KEYS[name]}" for name in idle]


def data_of(draft: Draft, dataset: Mapping[str, Any] | None) -> None:
    """Sources, buckets, masks and captions.

    Args:
        dataset: tables of the file that `--dataset_config` names.
    Raises:
        UserError: the options name no images.
    """
    merged = _fallbacks(draft, dataset) if dataset is not None else dict(draft.given)
    sources = _sources_of_file(draft, dataset, merged) if dataset is not None else _sources_of_options(draft)
    draft.put("data.sources", sources, *_OF_SOURCES)
    _buckets(draft, merged)
    _captions(draft, merged, sources)
    _modes(draft, merged, of_latents=any("latents" in source for source in sources))
    if "prior_loss_weight" in merged and any(source.get("prior") for source in sources):
        draft.put("objective.loss_weights.prior", float(merged["prior_loss_weight"]), "prior_loss_weight")
    if any("masks" in source for source in sources):
        draft.put("objective.loss.masked", True, "masked_loss")
    draft.leave("masked_loss", "no image has a mask: alpha_mask or conditioning_data_dir says where they are")
    if split := merged.get("validation_split"):
        draft.put("data.validation_fraction", float(split), "validation_split")


def _sources_of_options(draft: Draft) -> list[dict[str, Any]]:
    folder, metadata = draft.take("train_data_dir"), draft.take("in_json")
    if folder is None:
        raise UserError("--train_data_dir: missing, and there is no --dataset_config; without one there are no images")
    own = {"repeats": draft.take("dataset_repeats")} if draft.take("dataset_repeats", 1) != 1 else {}
    if metadata is not None:
        sources = [_metadata_source(folder, metadata, draft.given) | own]
    else:
        sources = [_folder_source(folder, draft.given, with_repeats=True)]
    if regularization := draft.take("reg_data_dir"):
        sources.append(_folder_source(regularization, draft.given, with_repeats=True) | {"prior": True})
    return sources


def _metadata_source(folder: str, metadata: str, options: Mapping[str, Any]) -> dict[str, Any]:
    place = Path(folder).expanduser()
    has_latents = place.is_dir() and next(place.glob("*.npz"), None) is not None
    source: dict[str, Any] = {"type": "kohya_json", "path": metadata, "latents" if has_latents else "images": folder}
    return source | ({"masks": "alpha"} if options.get("alpha_mask") else {})


def _folder_source(folder: str, options: Mapping[str, Any], *, with_repeats: bool) -> dict[str, Any]:
    extension = options.get("caption_extension") or options.get("caption_extention") or ".caption"
    source: dict[str, Any] = {"path": folder, "caption_extension": extension}
    source |= {"kohya_repeats": True} if with_repeats else {}
    if any(options.get(name) for name in _OF_TAGS):
        source["caption_files_hold"] = "tags"
    if (masks := options.get("conditioning_data_dir")) and options.get("masked_loss"):
        source |= {"masks": "files", "mask_folder": masks}
    elif options.get("alpha_mask"):
        source["masks"] = "alpha"
    return source


def _fallbacks(draft: Draft, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for all: of the options, then `[general]`, then the data set of the largest resolution."""
    datasets = [each for each in dataset.get("datasets", []) if isinstance(each, dict)]
    if not datasets:
        raise UserError("--dataset_config: the file has no [[datasets]]")
    largest = max(datasets, key=lambda each: _side(each.get("resolution", 0)))
    if len({_side(each.get("resolution", 0)) for each in datasets}) > 1:
        draft.notes.append(
            "the data sets have several resolutions: all images are prepared at the largest; `data.buckets.also_at` "
            "trains each at smaller ones as well"
        )
    merged = (
        dict(draft.given)
        | dict(dataset.get("general", {}))
        | {name: value for name, value in largest.items() if name != "subsets"}
    )
    if "batch_size" in merged:
        merged["train_batch_size"] = merged["batch_size"]
        draft.put("train.batch_size_per_gpu", int(merged["batch_size"]), "train_batch_size")
    return merged


def _sources_of_file(draft: Draft, dataset: Mapping[str, Any], merged: Mapping[str, Any]) -> list[dict[str, Any]]:
    sources: list[dict[str, Any]] = []
    for each in dataset.get("datasets", []):
        for subset in each.get("subsets", []):
            options = {**merged, **{k: v for k, v in each.items() if k != "subsets"}, **subset}
            folder = options.get("image_dir")
            if not folder:
                raise UserError("--dataset_config: a subset has no image_dir")
            if metadata := options.get("metadata_file"):
                source = _metadata_source(folder, metadata, options)
            else:
                source = _folder_source(folder, options, with_repeats=False)
            source |= {"repeats": options["num_repeats"]} if options.get("num_repeats", 1) != 1 else {}
            source |= {"prior": True} if options.get("is_reg") else {}
            if words := options.get("class_tokens"):
                draft.notes.append(f"{folder}: class_tokens `{words}`: only images with a caption are used; write it "
                                   "into their caption files")  # fmt: skip
            differing = sorted(name for name in subset if name not in _SUBSET_KEYS and subset[name] != merged.get(name))
            if differing:
                draft.notes.append(f"{folder}: {', '.join(differing)}: hold for all sources here, as the others say")
            sources.append(source)
    if not sources:
        raise UserError("--dataset_config: the file has no [[datasets.subsets]]")
    return sources


def _side(resolution: Any) -> int:
    """Of a square of as many pixels; `1024`, `1024,768` or [1024, 768]."""
    parts = resolution if isinstance(resolution, list) else str(resolution).split(",")
    try:
        sizes = [int(part) for part in parts]
    except ValueError:
        raise UserError(f"--resolution {resolution}: must be a size in px, or width,height") from None
    return round(math.sqrt(sizes[0] * sizes[-1]))


def _buckets(draft: Draft, merged: Mapping[str, Any]) -> None:
    step = int(merged.get("bucket_reso_steps", 64))
    if step % 8:
        draft.notes.append(f"bucket_reso_steps = {step}: sides must be multiples of 8; 64 is taken")
        step = 64
    said = merged.get("resolution", 1024)
    side = _side(said)
    if side % step:
        draft.notes.append(f"resolution = {said}: a square of as many pixels is {side} px, rounded to steps of {step}")
        side = max(step, round(side / step) * step)
    draft.put("data.buckets.resolution", side, "resolution")
    if merged.get("enable_bucket"):
        least, most = int(merged.get("min_bucket_reso", 256)), int(merged.get("max_bucket_reso", 1024))
        least, most = min(least // step * step or step, side), max(-(-most // step) * step, side)
        draft.put("data.buckets.min_px", least, "min_bucket_reso", "enable_bucket")
        draft.put("data.buckets.max_px", most, "max_bucket_reso")
    else:
        draft.put("data.buckets.min_px", side)
        draft.put("data.buckets.max_px", side)
        draft.notes.append("without enable_bucket all images are cut to squares, as kohya's scripts do; wider "
                           "data.buckets.min_px and max_px keep their shapes")  # fmt: skip
    if step != 64:
        draft.put("data.buckets.step_px", step, "bucket_reso_steps")
    if merged.get("bucket_no_upscale"):
        draft.put("data.buckets.no_upscale", True, "bucket_no_upscale")


def _captions(draft: Draft, merged: Mapping[str, Any], sources: list[dict[str, Any]]) -> None:
    for name, key in _CAPTIONS.items():
        if merged.get(name):
            draft.put(f"captions.{key}", merged[name], name)
    of_tags = any(merged.get(name) for name in _OF_TAGS)
    if merged.get("shuffle_caption"):
        draft.put("captions.shuffle_tags", True, "shuffle_caption")
    if (separator := merged.get("caption_separator", ",")) != ",":
        draft.put("captions.tag_separator", separator, "caption_separator")
    if any(source.get("type") == "kohya_json" for source in sources):
        draft.put("captions.use", "both")
        if of_tags:
            draft.notes.append("caption and tags of the metadata: tags are shuffled and dropped, the caption before "
                               "them stays whole (kohya's scripts cut it at its commas)")  # fmt: skip
    elif of_tags:
        draft.put("captions.use", "tags")
    length = merged.get("max_token_length")
    if length in (150, 225):
        draft.put("captions.max_tokens", length, "max_token_length")
        draft.put("captions.chunks", "kohya")


def _modes(draft: Draft, merged: Mapping[str, Any], *, of_latents: bool) -> None:
    if draft.take("vae_batch_size"):
        draft.put("data.vae_batch_size", draft.take("vae_batch_size"), "vae_batch_size")
    augments = {"flip_aug": "flip_probability", "random_crop": "random_crop"}
    wanted = [name for name in augments if merged.get(name)]
    if of_latents:  # of which both sides may be stored; crops are made
        draft.leave("random_crop", "latents are there already, and are not cropped anew")
        if "flip_aug" in wanted:
            draft.put("data.augment.flip_probability", 0.5, "flip_aug")
        wanted = []
    for name in wanted:
        draft.put(f"data.augment.{augments[name]}", 0.5 if name == "flip_aug" else True, name)
    if wanted:
        draft.put("data.mode", "images", *wanted)
        draft.notes.append(f"{', '.join(wanted)}: images are encoded anew at each visit (data.mode: images), which "
                           "costs time in each step; without it latents are stored once")  # fmt: skip
    else:
        for name in ("cache_latents", "cache_latents_to_disk"):
            draft.leave(name, "latents are always stored once, on disk (data.mode)")
    if merged.get("cache_text_encoder_outputs") or draft.take("cache_text_encoder_outputs_to_disk"):
        names = ("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")
        if wanted:
            for name in names:
                draft.leave(name, f"nothing that a model has computed is stored with {', '.join(wanted)}")
        else:
            draft.put("data.cache_text", True, *names)

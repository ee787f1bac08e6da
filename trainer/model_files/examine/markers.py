"""What a stored model tells of itself: prediction type, markers, metadata; without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from trainer.guards import DEFAULT_LIMITS, Refused, parse_json, printable
from trainer.model_files.diffusers_folder import object_or_nothing
from trainer.model_files.examine.identify import Identity
from trainer.model_files.examine.stored_tensors import StoredFile
from trainer.model_files.modelspec import PREFIX, told_prediction_type

MARKERS = ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
_SS_SHOWN = (
    "base_model_version",
    "sd_model_name",
    "network_module",
    "network_dim",
    "network_alpha",
    "resolution",
    "num_train_images",
    "num_epochs",
    "epoch",
    "steps",
    "max_train_steps",
    "batch_size_per_device",
    "learning_rate",
    "unet_lr",
    "text_encoder_lr",
    "lr_scheduler",
    "optimizer",
    "mixed_precision",
    "noise_offset",
    "min_snr_gamma",
    "v_parameterization",
    "zero_terminal_snr",
    "training_comment",
)
_MOST_SHOWN = 160
_MOST_KEYS = 100


@dataclass(frozen=True)
class Prediction:
    """What the model predicts, as loaders will take it."""

    type: str
    """epsilon, v_prediction, flow, edm or unknown."""
    zero_terminal_snr: bool
    source: str
    """How it is known."""
    warning: str = ""
    """Where what the model tells does not agree."""


def prediction(path: Path, found: Identity, files: tuple[StoredFile, ...]) -> Prediction:
    """The prediction type that a model's markers, metadata and scheduler tell.

    A single file is taken for epsilon by A1111, ComfyUI and diffusers unless it has the tensor `v_pred`; of
    metadata, they read nothing. A diffusers folder says it in its scheduler's configuration.
    """
    names = {tensor.name for file in files for tensor in file.tensors}
    if path.is_file():
        return _of_single_file(names, told_prediction_type(files[0].header.metadata))
    file = path / "scheduler" / "scheduler_config.json"
    config = object_or_nothing(file)
    if not config:
        where = "in the run's configuration" if found.layout == "checkpoint" else "nowhere in this folder"
        return Prediction("unknown", False, f"it stands {where}")
    told = config.get("prediction_type", "epsilon")
    zero = config.get("rescale_betas_zero_snr") is True
    return Prediction(printable(str(told), 40), zero, "scheduler/scheduler_config.json")


def _of_single_file(names: set[str], told: str | None) -> Prediction:
    found = [marker for marker in MARKERS if marker in names]
    zero = "ztsnr" in found
    by = f"marker {', '.join(found)}" if found else "no marker"
    if told:
        by += f"; modelspec says {told}"
    if any(marker.startswith("edm") for marker in found):
        return Prediction("edm", zero, by)
    if "v_pred" in found:
        warning = f"the metadata say {told}, and loaders go by the marker" if told not in (None, "v_prediction") else ""
        return Prediction("v_prediction", zero, by, warning)
    if told == "v_prediction":
        return Prediction(told, zero, by, "without the marker v_pred, A1111 and ComfyUI take it for epsilon")
    if told == "flow":
        return Prediction(told, zero, by, "no loader reads this: ComfyUI needs the node ModelSamplingSD3")
    warning = "ztsnr without v_pred: loaders ignore it" if zero else ""
    return Prediction("epsilon", zero, by, warning)


def readable_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    """Metadata fit to be read: modelspec first, pictures as their size, a LoRA's training record as a summary."""
    spec = {_printable(key): _shown(value) for key, value in metadata.items() if key.startswith(PREFIX)}
    record = {key.removeprefix("ss_"): value for key, value in metadata.items() if key.startswith("ss_")}
    other = {
        _printable(key): _shown(value)
        for key, value in metadata.items()
        if not key.startswith((PREFIX, "ss_")) and key != "format"
    }
    summary = {f"ss_{key}": _shown(record[key]) for key in _SS_SHOWN if _is_told(record.get(key))}
    tags = _tag_summary(record.get("tag_frequency", ""))
    if tags:
        summary["ss_tag_frequency"] = tags
    rest = len(record) - len(summary)
    if rest:
        summary["ss_..."] = f"{rest} more keys of kohya's training record (--json has all)"
    return _first(spec) | _first(other) | summary


def _first(told: dict[str, str]) -> dict[str, str]:
    if len(told) <= _MOST_KEYS:
        return told
    return dict(islice(told.items(), _MOST_KEYS)) | {"...": f"{len(told) - _MOST_KEYS:,} more (--json has all)"}


def _is_told(value: str | None) -> bool:
    return value not in (None, "", "None", "null")


def _shown(value: str) -> str:
    picture = re.match(r"data:([\w/+.-]{1,40});base64,", value)
    if picture:
        return f"{picture[1]}, {(len(value) - picture.end()) * 3 // 4:,} bytes"
    plain = _printable(value)
    return plain if len(plain) <= _MOST_SHOWN else f"{plain[:_MOST_SHOWN]}... ({len(value):,} characters)"


def _printable(text: str) -> str:
    return printable(" ".join(text[: 2 * _MOST_SHOWN].split()), 2 * _MOST_SHOWN)


def _tag_summary(text: str) -> str:
    """Counts of kohya's tag statistics: {folder: {tag: count}}."""
    try:
        folders = parse_json(text.encode(errors="replace"), "", most_bytes=DEFAULT_LIMITS.header_bytes)
        counts = [tags for tags in folders.values() if isinstance(tags, dict)]
        frequent: dict[str, int] = {}
        for tags in counts:
            for tag, count in tags.items():
                frequent[tag] = frequent.get(tag, 0) + int(count)
    except (Refused, ValueError, TypeError, AttributeError, OverflowError):
        return ""
    first = ", ".join(_printable(tag)[:40] for tag in sorted(frequent, key=lambda tag: -frequent[tag])[:5])
    return f"{len(frequent):,} tags of {len(counts)} folders, most often {first}"

"""What a prepared data set was made with, and what to say when the configuration asks for something else."""

import glob
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.config.sections.data.filters_config import FiltersConfig
from trainer.config.sections.data.sources import FolderSource, Source
from trainer.data.buckets import ALSO_AT, Bucket, BucketRules, OtherResolution, at_resolution, bucket_at
from trainer.data.loss_weights import TagSeparators
from trainer.data.sources.listing import source_names
from trainer.data.store.moves import Move
from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, Limits, Refused, read_json

SETTINGS_FORMAT = 2
_READ_WHEN_TRAINED = ("loss_weight", "prior")  # of a source; may change at any time
_FILTERS = "data.filters"
_NO_FILTERS = FiltersConfig()
_AS_USUAL = TagSeparators()
_USED: dict[str, Any] = {
    "data.rows_per_shard": int,
    "data.buckets.resolution": int,
    "data.cache_text": bool,
    "the VAE's scaling_factor": int | float,
    "the VAE (weights and model.vae_precision)": str,
}
"""What is read of the settings by what goes on with a set."""
_MOST = 1 << 24
_PLACES = ("path", "metadata", "tars", "files", "latents", "images", "mask_folder")
_OPTIONAL = (
    "weight_extension",
    "weight_field",
    "weight_column",
    "score_field",
    "score_column",
    "captions_field",
    "tags_extension",
    "weight",
    "per_epoch",
    "share",
)  # left out if not given


@dataclass(frozen=True)
class PrepareSettings:
    """Everything that decides what `prepare` writes, but for the images.

    `vae` and `text_encoders` are fingerprints of the weights with the precision they run in, such as
    `xxh3:0a1b... fp32`; `text_encoders` is None unless their outputs are cached, and so are `captions`, the keys of
    that section that are not at their default.
    """

    prepared: Path
    sources: tuple[Source, ...]
    buckets: BucketRules
    vae: str
    scaling_factor: float
    text_encoders: str | None = None
    captions: dict[str, Any] | None = None
    validation_fraction: float = 0.0
    rows_per_shard: int = 2048
    mode: Literal["latents", "images"] = "latents"
    limits: Limits = DEFAULT_LIMITS
    """Of what is read; what was prepared within others stays."""
    filters: FiltersConfig = _NO_FILTERS
    """Which images are left out; may change at any time."""
    separators: TagSeparators = _AS_USUAL
    """Of the tags that are filtered."""
    also_at: tuple[OtherResolution, ...] = ()
    """Resolutions at which images are held as well; may change at any time."""

    def to_json(self) -> dict[str, Any]:
        """Flat, under the names of the configuration; sources as absolute paths."""
        return {
            "format": SETTINGS_FORMAT,
            "data.sources": [
                _source_to_json(source) | {"name": name}
                for source, name in zip(self.sources, source_names(self.sources), strict=True)
            ],
            "data.mode": self.mode,
            "data.buckets.resolution": self.buckets.resolution,
            "data.buckets.min_px": self.buckets.min_px,
            "data.buckets.max_px": self.buckets.max_px,
            "data.buckets.step_px": self.buckets.step_px,
            "data.buckets.no_upscale": self.buckets.no_upscale,
            "data.validation_fraction": self.validation_fraction,
            "data.rows_per_shard": self.rows_per_shard,
            "data.cache_text": self.text_encoders is not None,
            "the VAE (weights and model.vae_precision)": self.vae,
            "the VAE's scaling_factor": self.scaling_factor,
            "the text encoders (weights and model.text_encoder_precision)": self.text_encoders,
            **({} if self.captions is None else {"captions": self.captions}),
            **({_FILTERS: self._filters_to_json()} if self.filters.is_on else {}),
            **({ALSO_AT: [asdict(other) for other in self.also_at]} if self.also_at else {}),
        }

    def elsewhere_of(self, bucket: Bucket) -> list[tuple[int, Bucket]]:
        """The other resolutions that images of a bucket are held at, and in which buckets there; not where they would
        be the same pixels."""
        found = [(other.resolution, at_resolution(self.buckets, other.resolution)) for other in self.also_at]
        held = [(resolution, bucket_at(bucket, rules)) for resolution, rules in found]
        return [(resolution, there) for resolution, there in held if there != bucket]

    def _filters_to_json(self) -> dict[str, Any]:
        """Those that are on, and what separates tags, where they are filtered."""
        splits_tags = self.filters.tags_include or self.filters.tags_exclude
        separators = {"tag_separators": [self.separators.tag, *self.separators.others]} if splits_tags else {}
        return self.filters.model_dump(mode="json", exclude_defaults=True) | separators


def _source_to_json(source: Source) -> dict[str, Any]:
    """Without the keys of masks where there are none, and of JSON where captions are text: as before there were any."""
    idle = {*_READ_WHEN_TRAINED}
    if isinstance(source, FolderSource) and not source.holds_json:
        idle |= {"caption_field", "captions_field", "tags_field"}
    return {
        key: os.path.realpath(value) if isinstance(value, Path) else value
        for key, value in source.model_dump(exclude=idle).items()
        if (value is not None or key not in _OPTIONAL) and (source.masks != "none" or not key.startswith("mask"))
    }


def check_settings(settings: PrepareSettings) -> bool:
    """Whether `settings.prepared` was made, or begun, with exactly these settings.

    False where nothing was prepared yet, or where only sources, filters and further resolutions differ: what is there
    of them is used.

    Raises:
        UserError: the set was prepared with other settings; a line for each that differs.
    """
    old = _stored(settings.prepared)
    if old is None:
        return False
    new = settings.to_json()
    problems = [
        f"data.prepared ({settings.prepared}): was prepared with {name} = {_shown(old.get(name))}, "
        f"the configuration has {_shown(new.get(name))}"
        for name in new
        if name not in ("data.sources", _FILTERS, ALSO_AT) and old.get(name) != new[name]
    ]
    problems += _mask_problems(settings.prepared, old["data.sources"], new["data.sources"])
    if problems:
        raise UserError(
            *problems,
            f"data.prepared ({settings.prepared}): give another folder to keep both, put the old settings back, or "
            "delete this folder to prepare it anew",
        )
    return old == new


def store_settings(settings: PrepareSettings) -> None:
    """Write them down as the settings that the prepared folder is made with."""
    text = json.dumps(settings.to_json(), ensure_ascii=False, indent=2) + "\n"
    replace_file(settings.prepared / "settings.json", text)


def begin_with(settings: PrepareSettings) -> bool:
    """Note what the sources are looked at with, which binds nobody until something is planned.

    Returns whether that was noted before: then what an interrupted look found holds.
    """
    path = settings.prepared / "scan-settings.json"
    text = json.dumps(settings.to_json(), ensure_ascii=False, indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8", errors="replace") == text:
        return True
    replace_file(path, text)
    return False


def stored_settings(prepared: Path) -> dict[str, Any]:
    """As `PrepareSettings.to_json` gave them."""
    stored = _stored(prepared)
    if stored is None:
        raise UserError(f"data.prepared ({prepared}): nothing has been planned there yet")
    for name, kind in _USED.items():
        if not isinstance(stored.get(name), kind) or (kind is not str and not 0 <= stored[name] < _MOST):
            path = prepared / "settings.json"
            raise UserError(f"{path}: was altered: {name} = {_shown(stored.get(name))[:60]}; restore it")
    return stored


def replace_file(path: Path, text: str | Iterable[str]) -> None:
    """Write a file so that it is there whole or not at all, after a power cut as well."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames within the folder survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _stored(prepared: Path) -> dict[str, Any] | None:
    path = prepared / "settings.json"
    try:
        stored = read_json(path)
    except FileNotFoundError:
        return None
    except Refused as error:
        raise UserError(
            f"{path}: cannot be read ({str(error).removeprefix(f'{path}: ')}); restore it or delete the folder"
        ) from error
    sources = stored.setdefault("data.sources", []) if isinstance(stored, dict) else None
    if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
        raise UserError(f"{path}: was altered, it holds no settings; restore it or delete the folder")
    return stored


def _pairs_by_name(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each source that there was and still is, as it was and as it is; older sets have no names, but an order."""
    by_name = {was.get("name", i): was for i, was in enumerate(old)}
    found = [(by_name.get(now["name"], by_name.get(i)), now) for i, now in enumerate(new)]
    return [(was, now) for was, now in found if was is not None and was.get("type") == now.get("type")]


def _mask_problems(prepared: Path, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """Masks are stored with latents: whether a source has some must stay as it was."""
    return [
        f"data.prepared ({prepared}): was prepared with data.sources[{new.index(now)}].{name} = "
        f"{_shown(was.get(name, 'none'))}, the configuration has {_shown(now.get(name, 'none'))}"
        for was, now in _pairs_by_name(old, new)
        for name in ("masks", "mask_suffix", "mask_column")
        if was.get(name, "none") != now.get(name, "none") and (name == "masks" or (name in was and name in now))
    ]


def moves_of(settings: PrepareSettings) -> tuple[Move, ...]:
    """Places of sources that are others in the configuration than when the set was prepared."""
    old = _stored(settings.prepared)
    if old is None:
        return ()
    pairs = _pairs_by_name(old["data.sources"], settings.to_json()["data.sources"])
    places = [(was.get(key), now.get(key)) for was, now in pairs for key in _PLACES]
    texts = [(was, now) for was, now in places if isinstance(was, str) and isinstance(now, str) and was != now]
    return tuple((_folder_of(was), _folder_of(now)) for was, now in texts)


def _folder_of(place: str) -> str:
    """Of a pattern its folder."""
    return os.path.dirname(place) if glob.has_magic(place) else place  # noqa: PTH120 - texts, not files


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)

"""The files of a component's folder in diffusers' layout: found, counted and fingerprinted, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from trainer.guards import DEFAULT_LIMITS, Limits, Refused, printable, read_json
from trainer.model_files.header import HeaderFault, read_header

WEIGHTS_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_VARIANTS = ("", ".fp16", ".bf16")
# Who wrote a configuration and in which dtype says nothing about the function that the weights compute.
_ORIGIN_KEYS = {"transformers_version", "dtype", "torch_dtype"}
_PIECE_BYTES = 8 << 20
MOST_FILES = 1000  # of the weights of one component


def read_config(folder: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The `config.json` of one component's folder.

    Raises:
        UserError: it is missing, or no JSON object.
    """
    return read_object(folder / "config.json", limits)


def read_object(file: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """The JSON object in a small file of a model folder, of at most `limits.config_bytes`.

    Raises:
        UserError: it is missing, or no JSON object.
    """
    try:
        content = read_json(file, limits, most_bytes=limits.config_bytes)
    except OSError as error:
        raise Refused(f"{file}: cannot be read: {error.strerror or error}") from None
    if not isinstance(content, dict):
        raise Refused(f"{file}: not a JSON object")
    return content


def object_or_nothing(file: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """As `read_object`; {} of what it refuses."""
    try:
        return read_object(file, limits)
    except Refused:
        return {}


def weight_files(folder: Path, limits: Limits = DEFAULT_LIMITS) -> tuple[Path, ...]:
    """The safetensors files of one component's folder: one file, or all that its index names; () if there are none.

    A file without a variant name is preferred to an fp16 or bf16 variant.

    Raises:
        UserError: the index cannot be read, or names files elsewhere.
    """
    for stem in dict.fromkeys(WEIGHTS_STEMS.values()):
        for variant in _VARIANTS:
            file = folder / f"{stem}{variant}.safetensors"
            if file.is_file():
                return (file,)
            for index_name in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
                index = folder / index_name
                if index.is_file():
                    return tuple(folder / name for name in _named_files(index, limits))
    return ()


def _named_files(index: Path, limits: Limits) -> list[str]:
    content = read_json(index, limits, most_bytes=limits.header_bytes)
    places = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(places, dict):
        raise Refused(f"{index}: not an index of weight files, which has a `weight_map`")
    names = [name for name in places.values() if isinstance(name, str)]
    strange = next((name for name in names if Path(name).name != name or not name.endswith(".safetensors")), None)
    if strange is not None or len(names) != len(places):
        told = printable(str(strange), 80) if strange is not None else "what is no name"
        raise Refused(f"{index}: names {told}; wanted safetensors files beside it")
    if len(set(names)) > MOST_FILES:
        raise Refused(f"{index}: names {len(set(names)):,} files; at most {MOST_FILES} are read")
    return sorted(set(names))


def weights_fingerprint(folder: Path, limits: Limits = DEFAULT_LIMITS) -> str:
    """32 hex digits that change with a component's weights or configuration, and not with its place or writer.

    xxh3 over the sorted configuration and the bytes of the weight files, read in pieces.
    """
    digest = config_digest(read_config(folder, limits))
    for file in weight_files(folder, limits):
        with file.open("rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()


def config_digest(config: dict[str, Any]) -> xxhash.xxh3_128:
    """A digest that has begun with what a configuration says of the function that the weights compute."""
    meaning = {key: value for key, value in config.items() if not key.startswith("_") and key not in _ORIGIN_KEYS}
    return xxhash.xxh3_128(json.dumps(meaning, sort_keys=True).encode())


def count_weights(folder: Path, limits: Limits = DEFAULT_LIMITS) -> int:
    """Number of weights in a component's folder, from the headers of its files."""
    return sum(weight_counts(folder, limits).values())


def weight_counts(folder: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, int]:
    """Number of weights in each tensor of a component's folder, by the names that its files have for them."""
    return {name: count for file in weight_files(folder, limits) for name, count in _counts(file, limits).items()}


def _counts(file: Path, limits: Limits) -> dict[str, int]:
    try:
        return {name: entry.count for name, entry in read_header(file, limits).tensors.items()}
    except HeaderFault as fault:
        raise Refused(f"{file}: is {fault.description}") from None

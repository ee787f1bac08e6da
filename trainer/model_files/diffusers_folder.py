"""The files of a component's folder in diffusers' layout: found, counted and fingerprinted, without torch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import xxhash

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


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of one component's folder."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def read_json(file: Path) -> dict[str, Any]:
    """A configuration of unknown origin, of at most 1 MiB; {} if it is missing, larger or not an object."""
    try:
        with file.open("rb") as stream:
            content = json.loads(stream.read(1 << 20))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of one component's folder: one file, or all that its index names; () if there are none.

    A file without a variant name is preferred to an fp16 or bf16 variant.
    """
    for stem in dict.fromkeys(WEIGHTS_STEMS.values()):
        for variant in _VARIANTS:
            file = folder / f"{stem}{variant}.safetensors"
            if file.is_file():
                return (file,)
            for index_name in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
                index = folder / index_name
                if index.is_file():
                    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
                    return tuple(folder / name for name in sorted(set(names)))
    return ()


def weights_fingerprint(folder: Path) -> str:
    """32 hex digits that change with a component's weights or configuration, and not with its place or writer.

    xxh3 over the sorted configuration and the bytes of the weight files, read in pieces.
    """
    digest = config_digest(read_config(folder))
    for file in weight_files(folder):
        with file.open("rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()


def config_digest(config: dict[str, Any]) -> xxhash.xxh3_128:
    """A digest that has begun with what a configuration says of the function that the weights compute."""
    meaning = {key: value for key, value in config.items() if key[0] != "_" and key not in _ORIGIN_KEYS}
    return xxhash.xxh3_128(json.dumps(meaning, sort_keys=True).encode())


def count_weights(folder: Path) -> int:
    """Number of weights in a component's folder, from the headers of its files."""
    count = 0
    for file in weight_files(folder):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count

"""What an SDXL folder in diffusers' layout must hold: finding, checking and identifying its files, without torch."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import xxhash

from trainer.errors import UserError

LAYOUT = "SDXL in diffusers' folder layout (unet/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/)"
_WEIGHTS_STEMS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "text_encoder_2": "model",
}
_VARIANTS = ("", ".fp16", ".bf16")
# Who wrote a configuration and in which dtype says nothing about the function that the weights compute.
_ORIGIN_KEYS = {"transformers_version", "dtype", "torch_dtype"}
_PIECE_BYTES = 8 << 20


def check_model_folder(path: Path, vae: Path | None = None) -> None:
    """Refuses anything but a complete SDXL folder that this trainer can train.

    Reads the configurations and the headers of the weight files, which takes milliseconds.

    Args:
        path: `model.path` of the configuration.
        vae: `model.vae`: a VAE folder that stands in for the model's own.
    Raises:
        UserError: with one line per problem.
    """
    problems = _not_a_folder("model.path", path)
    if problems:
        raise UserError(*problems)
    configs: dict[str, dict[str, Any]] = {}
    for name in _WEIGHTS_STEMS:
        place, folder = "model.path", path / name
        if name == "vae" and vae is not None:
            absent = _not_a_folder("model.vae", vae)
            if absent:
                problems += absent
                continue
            place, folder = "model.vae", vae_folder(path, vae)
        config, found = _check_component(place, folder, name)
        problems += found
        if config is not None:
            configs[name] = config
    for name in ("tokenizer", "tokenizer_2"):
        problems += _check_tokenizer(path / name)
    if "unet" in configs:
        mismatch = _check_unet(configs)
        # A model of another kind lacks parts by its nature: its one line says more than the list of them.
        problems = mismatch if mismatch and _kind(configs["unet"]) != "SDXL" else problems + mismatch
    problems += _check_scheduler(path)
    if problems:
        raise UserError(*problems)


def vae_folder(path: Path, vae: Path | None) -> Path:
    """The folder that holds the VAE's `config.json`: the model's own, or that of `vae`, itself or a model folder."""
    if vae is None:
        return path / "vae"
    return vae / "vae" if (vae / "vae" / "config.json").is_file() else vae


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of one component's folder."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of one component's folder: one file, or all that its index names; () if there are none.

    A file without a variant name is preferred to an fp16 or bf16 variant.
    """
    for stem in dict.fromkeys(_WEIGHTS_STEMS.values()):
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
    config = read_config(folder)
    meaning = {key: value for key, value in config.items() if key[0] != "_" and key not in _ORIGIN_KEYS}
    digest = xxhash.xxh3_128(json.dumps(meaning, sort_keys=True).encode())
    for file in weight_files(folder):
        with file.open("rb") as stream:
            while piece := stream.read(_PIECE_BYTES):
                digest.update(piece)
    return digest.hexdigest()


def _not_a_folder(place: str, path: Path) -> list[str]:
    if path.is_dir():
        return []
    if path.suffix in (".safetensors", ".ckpt", ".pt", ".bin") or path.is_file():
        return [f"{place}: {path}: single files are not read yet; give a folder with {LAYOUT}"]
    if not path.is_absolute() and re.fullmatch(r"[\w.-]+/[\w.-]+", path.as_posix()) and not path.parent.exists():
        return [
            f"{place}: {path}: no such folder, and hub ids are not read yet; if it is one, "
            f"run `hf download {path.as_posix()} --local-dir DIR` and give DIR"
        ]
    return [f"{place}: {path}: no such folder; wanted {LAYOUT}"]


def _check_component(place: str, folder: Path, name: str) -> tuple[dict[str, Any] | None, list[str]]:
    if not folder.is_dir():
        return None, [f"{place}: {folder}: the folder is missing; wanted {LAYOUT}"]
    file = folder / "config.json"
    if not file.is_file():
        return None, [f"{place}: {file}: the file is missing"]
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return None, [f"{place}: {file}: not valid JSON: {error}"]
    if not isinstance(config, dict):
        return None, [f"{place}: {file}: not a JSON object"]
    return config, _check_weights(place, folder, _WEIGHTS_STEMS[name])


def _check_weights(place: str, folder: Path, stem: str) -> list[str]:
    try:
        files = weight_files(folder)
    except (ValueError, KeyError, AttributeError) as error:
        return [f"{place}: {folder}: the index of the weight files cannot be read: {error!r}"]
    if not files:
        pickled = sorted(path.name for path in folder.glob("*.bin"))
        mend = f"; {pickled[0]} is a pickle, which is not read: save it as safetensors" if pickled else ""
        return [f"{place}: {folder}: no weights; wanted {stem}.safetensors{mend}"]
    return [f"{place}: {file}: {fault}" for file in files if (fault := _header_fault(file))]


def _header_fault(file: Path) -> str | None:
    """Why a file is not whole safetensors, by its header alone; None if it is."""
    if not file.is_file():
        return "the file is missing, and the index beside it names it"
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            return "is a git-lfs pointer in place of the weights; run `git lfs pull` in its folder"
        header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or header_bytes > size - 8:
            return "is not a safetensors file, or it is cut short"
        try:
            header = json.loads(stream.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "is not a safetensors file"
    wanted = 8 + header_bytes + max(ends, default=0)
    return None if size == wanted else f"has {size} bytes, and its header says {wanted}: copy it again"


def _check_tokenizer(folder: Path) -> list[str]:
    if not folder.is_dir():
        return [f"model.path: {folder}: the folder is missing; wanted {LAYOUT}"]
    if (folder / "tokenizer.json").is_file():
        return []
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    return [f"model.path: {folder}: {' and '.join(missing)} missing, and no tokenizer.json"] if missing else []


def _kind(unet: dict[str, Any]) -> str:
    if unet.get("addition_embed_type") == "text_time":
        is_refiner = (
            unet.get("cross_attention_dim") == 1280 and unet.get("projection_class_embeddings_input_dim") == 2560
        )
        return "the SDXL refiner" if is_refiner else "SDXL"
    known = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2"}
    width = unet.get("cross_attention_dim")
    return known.get(width, "not SDXL") if isinstance(width, int) else "not SDXL"


def _check_unet(configs: dict[str, dict[str, Any]]) -> list[str]:
    """Whether the UNet's configuration is SDXL's and fits the other parts that were found."""
    unet = configs["unet"]
    if _kind(unet) != "SDXL":
        return [
            f"model.path: the UNet is {_kind(unet)} (addition_embed_type {unet.get('addition_embed_type')}, "
            f"cross_attention_dim {unet.get('cross_attention_dim')}); wanted SDXL's base model"
        ]
    problems = []
    if {"text_encoder", "text_encoder_2"} <= configs.keys():
        one, two = configs["text_encoder"], configs["text_encoder_2"]
        text_width = one.get("hidden_size", 512) + two.get("hidden_size", 512)
        if unet.get("cross_attention_dim") != text_width:
            problems.append(
                f"model.path: unet cross_attention_dim is {unet.get('cross_attention_dim')}, "
                f"and the text encoders' hidden sizes add up to {text_width}; they must be equal"
            )
        vector = two.get("projection_dim", 512) + 6 * (unet.get("addition_time_embed_dim") or 0)
        if unet.get("projection_class_embeddings_input_dim") != vector:
            problems.append(
                f"model.path: unet projection_class_embeddings_input_dim is "
                f"{unet.get('projection_class_embeddings_input_dim')}, and text_encoder_2 projection_dim + "
                f"6 x unet addition_time_embed_dim is {vector}; they must be equal"
            )
    for key, meaning in (("in_channels", "takes"), ("out_channels", "gives")):
        channels = configs.get("vae", {}).get("latent_channels", 4)
        if unet.get(key, 4) != channels:
            problems.append(
                f"model.path: the UNet {meaning} {unet[key]} channels, and the VAE's latents have {channels}; "
                "they must be equal (inpainting models are not trained)"
            )
    return problems


def _check_scheduler(path: Path) -> list[str]:
    file = path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        return []
    try:
        prediction = json.loads(file.read_text(encoding="utf-8")).get("prediction_type", "epsilon")
    except (ValueError, AttributeError) as error:
        return [f"model.path: {file}: cannot be read: {error}"]
    if prediction == "epsilon":
        return []
    return [f"model.path: {file}: prediction_type is {prediction}; only epsilon models are trained yet"]


def count_weights(folder: Path) -> int:
    """Number of weights in a component's folder, from the headers of its files."""
    count = 0
    for file in weight_files(folder):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        count += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count

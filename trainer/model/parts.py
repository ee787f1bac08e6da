"""SDXL's components by name, shape and dtype, wherever their weights lie; tensors are read one at a time.

For what streams whole models (export, merge). Opening reads headers and configurations alone, without torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trainer.errors import UserError
from trainer.model.folder import read_config, weight_files
from trainer.model.header import Header, HeaderFault, read_header
from trainer.model.key_map import COMPONENTS, PREFIXES, KeyEntry, single_file_keys
from trainer.model.presets import preset
from trainer.model.tensor_file import read_tensor, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

TextProjection = Literal["correct", "kohya"]
CONFIGS_KEY = "sdxl_train.configs"  # metadata of a single file whose configurations are not SDXL's


@dataclass(frozen=True)
class PartTensor:
    """One tensor of a component's module.

    Attributes:
        dtype: safetensors' name of it, such as "F16", as it is stored.
        meta: a tensor of its shape and dtype, without memory.
        read: gives the tensor, in memory of its own on the CPU.
    """

    dtype: str
    meta: Tensor
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class Part:
    """One component: its configuration, and its tensors by their names in the module."""

    component: str
    origin: Path
    config: dict[str, Any]
    tensors: Mapping[str, PartTensor]


def checked_header(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        UserError: it is something else, damaged, or cannot be read.
    """
    try:
        return read_header(path)
    except HeaderFault as fault:
        raise UserError(f"{path}: is {fault.description}{f'; {fault.mend}' if fault.mend else ''}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def single_file_configs(metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The components' configurations of a single file: those in its metadata, the others SDXL's."""
    own = json.loads(metadata.get(CONFIGS_KEY, "{}"))
    return {component: own.get(component) or preset(component) for component in COMPONENTS}


def differing_configs(parts: Mapping[str, Part]) -> dict[str, dict[str, Any]]:
    """Configurations that are not SDXL's own; a single file must carry them."""
    return {name: part.config for name, part in parts.items() if not _is_sdxl(name, part.config)}


# What says nothing about the function that the weights compute.
_NEUTRAL = ("_", "transformers_version", "dtype", "torch_dtype", "architectures", "model_type", "sample_size")
# Of diffusers' keys that SDXL's published configurations leave out: defaults that are neither null, false nor 0.
_DEFAULTS = {
    "attention_type": "default",
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "mid_block_add_attention": True,
    "mid_block_scale_factor": 1,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}


def _is_sdxl(component: str, config: Mapping[str, Any]) -> bool:
    known = {key: value for key, value in preset(component).items() if not key.startswith(_NEUTRAL)}
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}
    if any(key not in own or own[key] != value for key, value in known.items()):
        return False
    more = {key: value for key, value in own.items() if key not in known and not key.startswith(_NEUTRAL)}
    return component.startswith("text") or not any(value and value != _DEFAULTS.get(key) for key, value in more.items())


def open_folder_part(component: str, folder: Path) -> Part:
    """A component in a folder of its own (`config.json` and safetensors), as diffusers and transformers write it.

    Raises:
        UserError: no weights, or they do not fit the configuration.
    """
    import torch

    files = weight_files(folder)
    if not files:
        raise UserError(f"{folder}: holds no safetensors weights")
    config = read_config(folder)
    wanted = {name for entry in single_file_keys({component: config}) for name in entry.names}
    tensors: dict[str, PartTensor] = {}
    for file in files:
        for stored_name, entry in checked_header(file).tensors.items():
            name = name_in_module(stored_name, wanted)
            if name is not None:
                meta = torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="meta")
                tensors[name] = PartTensor(entry.dtype, meta, _reader(file, entry))
    return _complete(Part(component, folder, config, tensors), wanted)


def open_single_file_parts(
    path: Path, components: tuple[str, ...] = COMPONENTS, text_projection: TextProjection = "correct"
) -> dict[str, Part]:
    """Components in a single .safetensors file.

    Args:
        text_projection: "kohya" if the file's matrix stands as a Linear's weight (see docs/publish.md).

    Raises:
        UserError: a component is missing from the file.
    """
    header = checked_header(path)
    configs = {name: config for name, config in single_file_configs(header.metadata).items() if name in components}
    found: dict[str, dict[str, PartTensor]] = {name: {} for name in configs}
    entries = single_file_keys(configs)
    for entry in entries:
        if entry.file_name in header.tensors:
            form = "same" if entry.form == "transposed" and text_projection == "kohya" else entry.form
            found[entry.component] |= _from_single_file(path, replace(entry, form=form), header)
    parts = {}
    for name, tensors in found.items():
        wanted = {own for entry in entries if entry.component == name for own in entry.names}
        parts[name] = _complete(Part(name, path, configs[name], tensors), wanted)
    return parts


def _from_single_file(path: Path, entry: KeyEntry, header: Header) -> dict[str, PartTensor]:
    import torch

    from trainer.model.single_file import from_file

    stored = header.tensors[entry.file_name]
    meta = torch.empty(stored.shape, dtype=torch_dtype(stored.dtype), device="meta")

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: dict(from_file(entry, read_tensor(path, stored)))[name]

    try:
        return {name: PartTensor(stored.dtype, of_name, reader(name)) for name, of_name in from_file(entry, meta)}
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def name_in_module(stored_name: str, wanted: Container[str]) -> str | None:
    """The module's tensor that a stored one is for; None if there is none.

    transformers 5 dropped the prefix `text_model.` of CLIPTextModel's parameters; diffusers 0.17 renamed the VAE's
    attention. Folders have either form.
    """
    candidates = [stored_name, stored_name.removeprefix("text_model."), f"text_model.{stored_name}"]
    for old, new in _OLD_ATTENTION.items():
        if old in stored_name:
            candidates.append(stored_name.replace(old, new))
    return next((name for name in candidates if name in wanted), None)


_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def _reader(file: Path, entry: Any) -> Callable[[], Tensor]:
    return lambda: read_tensor(file, entry)


def _complete(part: Part, wanted: set[str]) -> Part:
    missing = sorted(wanted - part.tensors.keys())
    if missing:
        of = f"{PREFIXES[part.component]} " if part.origin.is_file() else ""
        raise UserError(f"{part.origin}: lacks {len(missing)} of {len(wanted)} {of}tensors, such as {missing[0]}")
    return part

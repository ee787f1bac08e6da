"""Tensors of a stored model under the single file's names, whatever its layout, read in pieces; without torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.model_files.components import CONFIGS_KEY, name_in_module, told_config
from trainer.model_files.diffusers_folder import object_or_nothing, weight_files
from trainer.model_files.examine.identify import Identity, identify
from trainer.model_files.header import Header, read_header
from trainer.model_files.key_map import COMPONENTS, PREFIXES, UNET_PREFIX, KeyEntry, block_of, single_file_keys
from trainer.model_files.presets import preset

PIECE_BYTES = 8 << 20
_SDXL_WIDTH = 320
_COMPONENT_BEGINNINGS = (
    *((prefix, component) for component, prefix in PREFIXES.items()),
    ("conditioner.embedders.0.model.", "text_encoder_2"),  # the refiner's only one
    ("cond_stage_model.", "text_encoder"),
    ("lora_unet_", "unet"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te", "text_encoder"),
    ("unet.", "unet"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder.", "text_encoder"),
    ("vae.", "vae"),
)


@dataclass(frozen=True)
class StoredTensor:
    """One tensor, or one part of a tensor, in a file."""

    name: str
    """As SDXL's single file names it, with `[q]`, `[k]` or `[v]` for a part of a stacked tensor; in models of other
    kinds its own name, after the component's."""
    component: str
    """One of `COMPONENTS`, or "other"."""
    file: Path
    dtype: str
    shape: tuple[int, ...]
    """As it is stored."""
    begin: int
    num_bytes: int
    is_transposed: bool = False
    """Whether it is stored as the transpose of what a single file has."""
    data: memoryview | None = None
    """Its bytes where they are not at `begin` of the file: of a pickle."""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def block(self) -> str:
        """The block it belongs to, as in `trainer.model_files.key_map.block_of`."""
        return block_by_name(self.name)


@dataclass(frozen=True)
class StoredFile:
    """One file of a model, with its tensors in the order of their data."""

    path: Path
    header: Header
    tensors: tuple[StoredTensor, ...]


def stored_files(path: Path, found: Identity) -> tuple[StoredFile, ...]:
    """The files of a model with their tensors.

    Args:
        found: what `identify` says of the path; it must be readable.

    Raises:
        trainer.model_files.header.HeaderFault: a file is not whole.
        OSError: a file cannot be read.
    """
    if path.is_file():
        return (_single_file(path) if identify(path).is_readable else _pickle(path),)
    if found.layout == "component":
        component = found.parts[0] if found.parts else path.name
        return _component_files(path, component)
    folders = [folder for folder in sorted(path.iterdir()) if (folder / "config.json").is_file()]
    if found.layout == "checkpoint":  # which may hold the moving average beside the live weights
        folders = [folder for folder in folders if folder.name in found.parts]
    return tuple(file for folder in folders for file in _component_files(folder, folder.name))


def split_stacked(tensor: StoredTensor) -> tuple[StoredTensor, ...]:
    """The three parts of OpenCLIP's stacked query, key and value; any other tensor itself."""
    is_stacked = tensor.name.endswith((".attn.in_proj_weight", ".attn.in_proj_bias"))
    if not is_stacked or not tensor.shape or tensor.shape[0] % 3:
        return (tensor,)
    shape = (tensor.shape[0] // 3, *tensor.shape[1:])
    size = tensor.num_bytes // 3
    return tuple(
        replace(
            tensor,
            name=f"{tensor.name}[{letter}]",
            shape=shape,
            begin=tensor.begin + n * size,
            num_bytes=size,
            data=None if tensor.data is None else tensor.data[n * size : (n + 1) * size],
        )
        for n, letter in enumerate("qkv")
    )


def read_pieces(tensor: StoredTensor, piece_bytes: int = PIECE_BYTES) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor, at most `piece_bytes` (a multiple of 8) at a time.

    Raises:
        OSError: the file cannot be read, or has become shorter.
    """
    if tensor.data is not None:
        yield from (tensor.data[at : at + piece_bytes] for at in range(0, tensor.num_bytes, piece_bytes))
        return
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        for at in range(0, tensor.num_bytes, piece_bytes):
            wanted = min(piece_bytes, tensor.num_bytes - at)
            piece = stream.read(wanted)
            if len(piece) < wanted:
                raise OSError(f"{tensor.file}: has become shorter")
            yield piece


def wanted_names(files: tuple[StoredFile, ...]) -> set[str] | None:
    """Names that a single file of SDXL must have, by the configurations in its metadata or the published ones; None
    where they cannot be told."""
    header = files[0].header
    first = header.tensors.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if CONFIGS_KEY not in header.metadata and (first is None or first.shape[0] != _SDXL_WIDTH):
        return None
    try:
        configs = {component: told_config(header.metadata, component) for component in COMPONENTS}
    except ValueError:
        return None
    return {entry.file_name for entry in single_file_keys(configs)}


def _single_file(path: Path) -> StoredFile:
    header = read_header(path)
    tensors = tuple(
        StoredTensor(name, component_of(name), path, entry.dtype, entry.shape, entry.begin, entry.num_bytes)
        for name, entry in header.tensors.items()
    )
    if all(tensor.component == "other" for tensor in tensors):
        component, table = _table_of(header)
        tensors = tuple(_named(replace(tensor, component=component), table) for tensor in tensors)
    return StoredFile(path, header, tensors)


def _pickle(path: Path) -> StoredFile:
    """A checkpoint's tensors, mapped into memory by torch."""
    import torch

    from trainer.model_files.pickle_file import pickle_header, read_pickle

    content, header = read_pickle(path), pickle_header(path)
    tensors = []
    for name, entry in header.tensors.items():
        data = content[name].contiguous().reshape(-1).view(torch.uint8).numpy().data
        where = StoredTensor(name, component_of(name), path, entry.dtype, entry.shape, 0, entry.num_bytes, data=data)
        tensors.append(where)
    return StoredFile(path, header, tuple(tensors))


def component_of(name: str) -> str:
    """One of `COMPONENTS`, or "other", by a single file's name of a tensor."""
    return next((component for beginning, component in _COMPONENT_BEGINNINGS if name.startswith(beginning)), "other")


def _table_of(header: Header) -> tuple[str, dict[str, KeyEntry]]:
    """The component that a file without prefixes holds, as a module or as a single file names it, and its table."""
    best, component, chosen = 0.5, "other", dict[str, KeyEntry]()
    for candidate in COMPONENTS:
        modules = _table(candidate, preset(candidate))
        prefix = PREFIXES[candidate]
        singles = {entry.file_name.removeprefix(prefix): replace(entry, names=("",)) for entry in modules.values()}
        for table in (modules, singles):
            hits = sum(name_in_module(name, table.keys()) is not None for name in header.tensors)
            if hits / max(len(table), len(header.tensors)) > best:
                best, component, chosen = hits / max(len(table), len(header.tensors)), candidate, table
    return component, chosen


def _component_files(folder: Path, component: str) -> tuple[StoredFile, ...]:
    component = component if component in COMPONENTS else "other"
    table = _table(component, object_or_nothing(folder / "config.json"))
    files = []
    for path in weight_files(folder):
        header = read_header(path)
        tensors = tuple(
            _named(StoredTensor(name, component, path, entry.dtype, entry.shape, entry.begin, entry.num_bytes), table)
            for name, entry in header.tensors.items()
        )
        files.append(StoredFile(path, header, tensors))
    return tuple(files)


def _table(component: str, config: Mapping[str, Any]) -> dict[str, KeyEntry]:
    """A component's entries by the names in its module; {} where a configuration is not of SDXL's kind."""
    if component not in COMPONENTS:
        return {}
    try:
        entries = single_file_keys({component: config})
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return {}
    return {name: entry for entry in entries for name in entry.names}


def _named(tensor: StoredTensor, table: Mapping[str, KeyEntry]) -> StoredTensor:
    """A tensor of a component, under the single file's name if the table has it."""
    own = name_in_module(tensor.name, table.keys())
    if own is None:
        in_component = "" if tensor.component == "other" else f"{tensor.component}."
        return replace(tensor, name=in_component + tensor.name)
    entry = table[own]
    part = f"[{'qkv'[entry.names.index(own)]}]" if len(entry.names) == 3 else ""
    # An entry without names is of a table in the single file's own form.
    is_transposed = entry.form == "transposed" and entry.names != ("",)
    return replace(tensor, name=entry.file_name + part, is_transposed=is_transposed)


def block_by_name(name: str) -> str:
    """`key_map.block_of`; of models that are not SDXL, the first parts of a name up to a number."""
    block = block_of(name)
    if block != "other":
        return block
    parts = re.sub(r"\.(weight|bias|alpha)$", "", name).split(".")
    number = next((n for n, part in enumerate(parts) if part.isdecimal()), 1)
    return ".".join(parts[: min(number + 1, 4)])

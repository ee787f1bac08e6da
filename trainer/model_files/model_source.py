"""Where a model's weights lie and how they are read: a diffusers folder, a single file, a pickled checkpoint, a hub id.

Opening a source reads no weights. What names, configurations and counts tell is free of torch, but for pickles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, Limits, open_regular
from trainer.model_files import diffusers_folder as model_folder
from trainer.model_files.components import (
    Component,
    ComponentTensor,
    TextProjection,
    name_in_module,
    require_unscaled,
    told_config,
)
from trainer.model_files.config_bounds import ConfigFault
from trainer.model_files.header import Header, HeaderFault, TensorEntry, read_header
from trainer.model_files.hub import cached_model
from trainer.model_files.key_map import PREFIXES, TEXT_PROJECTION, VAE_PREFIX, KeyEntry, single_file_keys

if TYPE_CHECKING:
    from torch import Tensor

ModelPath = Path | str
"""A place on this host, or as text the id of a model on the hub."""
# Linear's own orientation: what other tools save under these names is not transposed.
LINEAR_PROJECTIONS = (f"{TEXT_PROJECTION}.weight", f"{TEXT_PROJECTION}.weight.weight")
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class ModelSource:
    """A place that weights are read from.

    Attributes:
        kind: `folder`: diffusers' layout, or a VAE's own folder; `file`: a single .safetensors file; `pickle`: a
            checkpoint of torch.
        limits: what is read of its small files and headers.
    """

    path: Path
    kind: Literal["folder", "file", "pickle"]
    limits: Limits = DEFAULT_LIMITS

    @cached_property
    def header(self) -> Header:
        """Names, dtypes and shapes of a file or pickle, read when they are first asked for.

        Raises:
            UserError: it cannot be read.
        """
        if self.kind == "pickle":
            from trainer.model_files.pickle_file import pickle_header

            return pickle_header(self.path, self.limits)
        try:
            return read_header(self.path, self.limits)
        except HeaderFault as fault:
            mend = f"; {fault.mend}" if fault.mend else ""
            raise UserError(f"{self.path}: is {fault.description}{mend}") from None


def find_source(model: ModelPath, limits: Limits = DEFAULT_LIMITS) -> ModelSource:
    """What `model.path` or `model.vae` names; of a hub id, the folder in the hub's cache.

    Raises:
        UserError: there is nothing.
    """
    if isinstance(model, str):
        cached = cached_model(model)
        if cached is None:
            raise UserError(f"model.path = {model}: not in the hub's cache of this host; run `hf download {model}`")
        model = cached
    if model.is_dir():
        return ModelSource(model, "folder", limits)
    try:
        with open_regular(model) as stream:
            start = stream.read(9)
    except OSError as error:
        raise UserError(f"{model}: cannot be read: {error.strerror}") from None
    return ModelSource(model, "file" if start[8:] == b"{" else "pickle", limits)


def component_config(source: ModelSource, component: str) -> dict[str, Any]:
    """The configuration of one of `COMPONENTS`: a single file's own, or SDXL's."""
    if source.kind == "folder":
        folder = component_folder(source, component)
        return bounded_config(component, folder, model_folder.read_config(folder, source.limits))
    return file_config(source.header if source.kind == "file" else None, component)


def bounded_config(component: str, folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration itself, if it is of SDXL's kind and of a sensible size.

    Raises:
        UserError: it is not.
    """
    try:
        single_file_keys({component: config})
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        told = str(error) if isinstance(error, ConfigFault) else f"not of SDXL's kind ({error!r})"
        raise UserError(f"{folder / 'config.json'}: {told}") from None
    return config


def file_config(header: Header | None, component: str) -> dict[str, Any]:
    """As `told_config`."""
    return told_config(header.metadata if header else {}, component)


def component_folder(source: ModelSource, component: str) -> Path:
    """The folder of a component's `config.json` and weights."""
    if component == "vae":
        vae = source.path / "vae"
        return vae if vae.is_dir() else source.path
    return source.path / component


def file_keys(header: Header, component: str, text_projection: TextProjection = "correct") -> list[KeyEntry]:
    """The table of a component with the names that this file has for it.

    A VAE's own file may lack the prefix, or be in diffusers' names. A text projection is transposed where it is saved
    as x @ P, and not where it is saved as a Linear's weight. Tensors that the file lacks have the usual name.

    Args:
        text_projection: `kohya` takes the matrix as kohya's scripts do, without transposing it.
    """
    names = header.tensors
    entries = []
    for entry in single_file_keys({component: file_config(header, component)}):
        if entry.file_name not in names:
            if entry.component == "vae":
                bare = entry.file_name.removeprefix(VAE_PREFIX)
                entry = replace(entry, file_name=bare) if bare in names else _in_diffusers_names(entry, names)
            elif entry.file_name == TEXT_PROJECTION:
                own = next((name for name in LINEAR_PROJECTIONS if name in names), None)
                entry = replace(entry, file_name=own, form="same") if own else entry
        elif entry.file_name == TEXT_PROJECTION and text_projection == "kohya":
            entry = replace(entry, form="same")
        entries.append(entry)
    return entries


def _in_diffusers_names(entry: KeyEntry, names: Mapping[str, TensorEntry]) -> KeyEntry:
    own = next((name for name in _old_names(entry.names[0]) if name in names), None)
    return replace(entry, file_name=own, form="same") if own else entry


def _old_names(name: str) -> Iterator[str]:
    yield name
    for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        if f".{new}." in name:
            yield name.replace(f".{new}.", f".{old}.")


def open_component(source: ModelSource, component: str, text_projection: TextProjection = "correct") -> Component:
    """One component: its configuration, and for each tensor of its module how to read it.

    Tensors are read one at a time into memory of their own; those of a pickle are views of the mapped file. Tensors
    of a folder that no module has are listed under their own names; those of a file are left out.

    Raises:
        UserError: the source cannot be read, or has none of the component's tensors.
    """
    if source.kind == "folder":
        return open_folder_component(component, component_folder(source, component), source.limits)
    header = source.header
    try:
        config = file_config(header, component)
    except ValueError as error:
        raise UserError(f"{source.path}: the configurations in its metadata cannot be used: {error}") from None
    keys = [key for key in file_keys(header, component, text_projection) if key.file_name in header.tensors]
    if not keys:
        raise UserError(f"{source.path}: holds no {PREFIXES[component]} tensors")
    require_unscaled(source.path, names_of(header, component))
    reader = _pickle_tensors(source) if source.kind == "pickle" else _file_tensors(source.path, header)
    tensors: dict[str, ComponentTensor] = {}
    for key in keys:
        tensors |= reader(key)
    return Component(component, source.path, config, tensors)


def names_of(header: Header, component: str) -> list[str]:
    """Names of a single file's tensors that are a component's; all of them in a file of one component alone."""
    own = [name for name in header.tensors if name.startswith(PREFIXES[component])]
    return own or list(header.tensors)


def open_folder_component(component: str, folder: Path, limits: Limits = DEFAULT_LIMITS) -> Component:
    """A component in a folder of any name: `config.json` and weights.

    Raises:
        UserError: the configuration or a file cannot be read, or the weights are scaled.
    """
    config = bounded_config(component, folder, model_folder.read_config(folder, limits))
    wanted = {name for entry in single_file_keys({component: config}) for name in entry.names}
    tensors: dict[str, ComponentTensor] = {}
    for file in model_folder.weight_files(folder, limits):
        header = ModelSource(file, "file", limits).header
        require_unscaled(file, header.tensors)
        for stored_name, entry in header.tensors.items():
            if not stored_name.endswith("position_ids"):
                tensors[name_in_module(stored_name, wanted) or stored_name] = _part_tensor(file, entry)
    return Component(component, folder, config, tensors)


def open_tensors(file: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, ComponentTensor]:
    """The tensors of a safetensors file that is no component, by their names in it.

    Raises:
        UserError: it is no such file, or cannot be read.
    """
    header = ModelSource(file, "file", limits).header
    return {name: _part_tensor(file, entry) for name, entry in header.tensors.items()}


def _part_tensor(file: Path, entry: TensorEntry, key: KeyEntry | None = None) -> ComponentTensor:
    """One tensor of the module that is read from a range of a file; with a `key`, changed to the module's form."""
    import torch

    from trainer.model_files.single_file import from_file
    from trainer.model_files.tensor_file import read_tensor, torch_dtype

    def changed(tensor: Tensor) -> Tensor:
        return from_file(key, tensor)[0][1] if key else tensor

    try:
        meta = changed(torch.empty(entry.shape, dtype=torch_dtype(entry.dtype), device="meta"))
    except ValueError as error:
        raise UserError(f"{file}: {error}") from None
    return ComponentTensor(entry.dtype, meta, lambda: changed(read_tensor(file, entry)))


def _file_tensors(path: Path, header: Header) -> Callable[[KeyEntry], dict[str, ComponentTensor]]:
    def tensors(key: KeyEntry) -> dict[str, ComponentTensor]:
        stored, count = header.tensors[key.file_name], len(key.names)
        if count == 1:
            return {key.names[0]: _part_tensor(path, stored, key)}
        if not stored.shape or stored.shape[0] % count:
            raise UserError(f"{path}: {key.file_name} has shape {list(stored.shape)}; wanted {count} equal parts")
        size = stored.num_bytes // count
        shape = (stored.shape[0] // count, *stored.shape[1:])
        return {
            name: _part_tensor(path, replace(stored, shape=shape, begin=stored.begin + i * size, num_bytes=size))
            for i, name in enumerate(key.names)
        }

    return tensors


def _pickle_tensors(source: ModelSource) -> Callable[[KeyEntry], dict[str, ComponentTensor]]:
    import torch

    from trainer.model_files.pickle_file import read_pickle
    from trainer.model_files.single_file import from_file
    from trainer.model_files.tensor_file import dtype_name

    stored = read_pickle(source.path, source.limits)

    def reader(tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor

    def tensors(key: KeyEntry) -> dict[str, ComponentTensor]:
        try:
            views = from_file(key, stored[key.file_name])
        except ValueError as error:
            raise UserError(f"{source.path}: {error}") from None
        return {
            name: ComponentTensor(
                dtype_name(view.dtype), torch.empty(view.shape, dtype=view.dtype, device="meta"), reader(view)
            )
            for name, view in views
        }

    return tensors


def count_weights(source: ModelSource, component: str) -> int:
    """Number of weights of a component, from headers."""
    if source.kind == "folder":
        return model_folder.count_weights(component_folder(source, component), source.limits)
    return sum(weight_counts(source, component).values())


def weight_counts(source: ModelSource, component: str) -> dict[str, int]:
    """Number of weights in each tensor of a component, by the names of the module's parameters, from headers."""
    if source.kind == "folder":
        wanted = {name for key in single_file_keys({component: component_config(source, component)})
                  for name in key.names}  # fmt: skip
        stored = model_folder.weight_counts(component_folder(source, component), source.limits)
        named = {name_in_module(name, wanted): count for name, count in stored.items()}
        return {name: count for name, count in named.items() if name is not None}
    tensors = source.header.tensors
    return {
        name: math.prod(tensors[key.file_name].shape) // len(key.names)
        for key in file_keys(source.header, component)
        if key.file_name in tensors
        for name in key.names
    }


def weights_fingerprint(source: ModelSource, component: str, text_projection: TextProjection = "correct") -> str:
    """32 hex digits that change with a component's weights or configuration, and not with the file's place.

    The same weights in a folder and in a single file have fingerprints of their own.
    """
    if source.kind == "folder":
        return model_folder.weights_fingerprint(component_folder(source, component), source.limits)
    header = source.header
    digest = model_folder.config_digest(file_config(header, component))
    keys = sorted(file_keys(header, component, text_projection), key=lambda key: key.names)
    keys = [key for key in keys if key.file_name in header.tensors]
    pickled: dict[str, Tensor] = {}
    if source.kind == "pickle":
        from trainer.model_files.pickle_file import read_pickle

        pickled = read_pickle(source.path, source.limits)
    with source.path.open("rb") as stream:
        for key in keys:
            entry = header.tensors[key.file_name]
            digest.update(f"{key.names} {key.form} {entry.dtype} {entry.shape}".encode())
            if pickled:
                digest.update(_bytes_of(pickled[key.file_name]))
            else:
                stream.seek(entry.begin)
                _digest_range(digest, stream.read, entry.num_bytes)
    return digest.hexdigest()


def _digest_range(digest: xxhash.xxh3_128, read: Callable[[int], bytes], num_bytes: int) -> None:
    while num_bytes > 0:
        piece = read(min(_PIECE_BYTES, num_bytes))
        if not piece:
            raise UserError("a weights file has become shorter while it was read; copy it again")
        digest.update(piece)
        num_bytes -= len(piece)


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data

"""Single files of a small model, written by the table of names and safetensors alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer.model_files.components import CONFIGS_KEY
from trainer.model_files.diffusers_folder import read_config
from trainer.model_files.key_map import COMPONENTS, LOGIT_SCALE, POSITION_IDS, single_file_keys
from trainer.model_files.model_source import ModelSource, find_source, open_component
from trainer.model_files.single_file import logit_scale, position_ids, to_file

Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def component_tensors(source: ModelSource, component: str) -> dict[str, Tensor]:
    """The tensors of a component by their names in the module, on the CPU, in the file's dtype."""
    return {name: tensor.read() for name, tensor in open_component(source, component).tensors.items()}


def hash_of_data(path: Path) -> str:
    """SHA-256 of all bytes of a safetensors file after its header."""
    data = path.read_bytes()
    return hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def single_file_tensors(folder: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every tensor of a single file of the model in `folder`."""
    source = find_source(folder)
    states = {name: component_tensors(source, name) for name in COMPONENTS}
    keys = single_file_keys({name: read_config(folder / name) for name in COMPONENTS})
    tensors = {
        key.file_name: to_file(key, [states[key.component][name] for name in key.names]).to(dtype) for key in keys
    }
    return tensors | {POSITION_IDS: position_ids(), LOGIT_SCALE: logit_scale(dtype)}


def write_single_file(
    folder: Path, file: Path, dtype: torch.dtype = torch.float32, change: Change = lambda tensors: tensors
) -> Path:
    """Write the model in `folder` as one file, with its configurations."""
    configs = {name: read_config(folder / name) for name in COMPONENTS}
    tensors = {name: tensor.contiguous().clone() for name, tensor in change(single_file_tensors(folder, dtype)).items()}
    save_file(tensors, file, metadata={CONFIGS_KEY: json.dumps(configs)})
    return file


def rewrite(file: Path, out: Path, change: Change, metadata: dict[str, str] | None = None) -> Path:
    """A copy of a single file with other tensors, and the same configurations."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    save_file(change(load_file(file)), out, metadata=header["__metadata__"] | (metadata or {}))
    return out

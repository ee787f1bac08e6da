"""Pickled checkpoints (`.ckpt`), read by torch's weights-only unpickler alone: it makes tensors and runs nothing."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import UserError
from trainer.model_files.header import Header, TensorEntry

if TYPE_CHECKING:
    from torch import Tensor

_MEND = "convert it to safetensors with a tool that you trust"


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU; views of the file, which is mapped and not read.

    Raises:
        UserError: it holds other things than tensors, or is of torch's old format, or is damaged.
    """
    import torch

    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) ([\w.]{1,100})", str(error))
        named = f" ({found[1]})" if found else ""
        raise UserError(
            f"{path}: holds more than tensors{named}; such a pickle can run any program, so it is not opened: {_MEND}"
        ) from None
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        if "mmap can only be used" in str(error):
            raise UserError(f"{path}: is a pickle of torch's old format, which is not read; {_MEND}") from None
        raise UserError(f"{path}: cannot be read as a checkpoint: {str(error).splitlines()[0][:200]}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(f"{path}: is a pickle of a {type(content).__name__}, not of named tensors")
    return {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}


def pickle_header(path: Path) -> Header:
    """What `read_pickle` finds, in the form of a safetensors header; the places of the data are not known.

    Raises:
        UserError: as `read_pickle`.
    """
    from trainer.model_files.tensor_file import dtype_name

    tensors = {
        name: TensorEntry(dtype_name(tensor.dtype), tuple(tensor.shape), 0, tensor.numel() * tensor.itemsize)
        for name, tensor in read_pickle(path).items()
    }
    return Header(tensors, {}, 0, path.stat().st_size)

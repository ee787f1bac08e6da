"""The file of FID's Inception weights: whether it is the published one, which is of torch's old format; its tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.guards import DEFAULT_LIMITS, Limits, open_regular
from trainer.model_files.components import ComponentTensor
from trainer.model_files.model_source import find_source, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED_SHA256 = "6726825d"
"""First digits of the checksum of what pytorch-fid calls pt_inception-2015-12-05-6726825d.pth, and torch-fidelity
weights-inception-2015-12-05-6726825d.pth; they stand in both names."""

_PIECE_BYTES = 8 << 20
_OLD_FORMAT = b"\x80"  # a pickle that is not in an archive: torch before 1.6


def is_published(path: Path) -> bool:
    """Whether it is the file that FID is defined by.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while piece := stream.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest().startswith(PUBLISHED_SHA256)


def inception_tensors(path: Path, limits: Limits = DEFAULT_LIMITS) -> Mapping[str, ComponentTensor]:
    """Its tensors by their names: of safetensors, or of a checkpoint of torch.

    Raises:
        UserError: it is none of these.
    """
    source = find_source(path, limits)
    if source.kind == "file":
        return open_tensors(path, limits)
    from trainer.model_files.pickle_file import read_old_pickle, read_pickle

    with open_regular(path) as stream:
        is_old = stream.read(1) == _OLD_FORMAT
    read = read_old_pickle if is_old else read_pickle
    return {name: _in_memory(tensor) for name, tensor in read(path, limits).items()}


def _in_memory(tensor: Tensor) -> ComponentTensor:
    from trainer.model_files.tensor_file import dtype_name

    return ComponentTensor(dtype_name(tensor.dtype), tensor.to("meta"), lambda: tensor)

"""Safetensors files of any size in bounded memory: written tensor by tensor, read one tensor at a time.

The format: 8 bytes of header length (little-endian), a JSON header, then the tensors' bytes without gaps.
Importing this module does not import torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import UserError
from trainer.model_files.header import TensorEntry

if TYPE_CHECKING:
    import torch

_TORCH_NAMES = {
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
    "F32": "float32",
    "I32": "int32",
    "U32": "uint32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I16": "int16",
    "U16": "uint16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_METADATA = "__metadata__"
_HASH_PREFIX = "0x"
_PIECE_BYTES = 8 << 20
_LARGE_BYTES = 64 << 10


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is going to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_tensor(path: Path, entry: TensorEntry) -> torch.Tensor:
    """One tensor of a file, in memory of its own on the CPU.

    The file is not mapped into memory: mapped pages count as this process's memory, in the end the whole file's.

    Args:
        entry: of the file's header.

    Raises:
        UserError: the file has become shorter since its header was read, or torch has no such dtype.
    """
    import torch

    if entry.dtype not in _TORCH_NAMES:
        raise UserError(f"{path}: holds tensors of dtype {entry.dtype}, which cannot be read here")
    # Memory from the system and not from the heap: buffers that come and go between weights that stay would leave holes
    # there, a third of the weights' size in all.
    if entry.num_bytes >= _LARGE_BYTES:
        memory = mmap.mmap(-1, entry.num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        data = torch.frombuffer(memory, dtype=torch.uint8)
    else:
        data = torch.empty(entry.num_bytes, dtype=torch.uint8)
    if entry.num_bytes:
        with path.open("rb", buffering=0) as stream:
            stream.seek(entry.begin)
            view, done = data.numpy().data, 0
            while done < len(view):
                count = stream.readinto(view[done:])
                if not count:
                    raise UserError(f"{path}: has become shorter while it was read; copy it again")
                done += count
    return data.view(torch_dtype(entry.dtype)).reshape(entry.shape)


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype of a safetensors name such as "BF16"."""
    import torch

    return getattr(torch, _TORCH_NAMES[name])


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a torch dtype; torch's own where it has none, which a pickle may hold."""
    own = str(dtype).removeprefix("torch.")
    return next((name for name, in_torch in _TORCH_NAMES.items() if in_torch == own), own)


def aligned(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The specs in an order in which every tensor begins at a multiple of its item's size: wide items first."""
    return sorted(specs, key=lambda spec: -spec.dtype.itemsize)


def write_tensor_file(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[torch.Tensor],
    metadata: Mapping[str, str],
    *,
    hash_key: str | None = None,
    on_written: Callable[[int], None] | None = None,
) -> str:
    """Write a file with at most one tensor in memory; it is there whole and on the disk, or not at all.

    Args:
        path: replaced if it exists, at the end.
        specs: all tensors, in an order that `aligned` gives.
        tensors: of the specs' dtypes and shapes, in their order, on any device.
        hash_key: metadata key that takes "0x" and the SHA-256 of the data, as modelspec.hash_sha256 wants it.
        on_written: told of every tensor's bytes.

    Returns:
        SHA-256 of the data (all bytes after the header), 64 hex digits.

    Raises:
        OSError: the disk is full or gone. Nothing is left behind, and what was at `path` is untouched.
    """
    entries = dict(metadata)
    if hash_key is not None:
        entries[hash_key] = _HASH_PREFIX + "0" * 64
    header = header_of(specs, entries)
    total = len(header) + sum(spec.num_bytes for spec in specs)
    free = shutil.disk_usage(path.parent).free
    if total > free:
        raise OSError(errno.ENOSPC, f"needs {total:,} bytes, {free:,} are free", str(path))
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(header)
            digest = hashlib.sha256()
            for spec, tensor in zip(specs, tensors, strict=True):
                data = _bytes_of(spec, tensor)
                digest.update(data)
                stream.write(data)
                if on_written is not None:
                    on_written(spec.num_bytes)
            if hash_key is not None:
                entries[hash_key] = _HASH_PREFIX + digest.hexdigest()
                stream.seek(0)
                stream.write(header_of(specs, entries))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_to_disk(path.parent)
    return digest.hexdigest()


def header_of(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """A file's bytes before its data: header length and header.

    Raises:
        ValueError: a name comes twice, or the order is not that of `aligned`.
    """
    content: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        if spec.name in content:
            raise ValueError(f"{spec.name}: given twice")
        if offset % spec.dtype.itemsize:
            raise ValueError(f"{spec.name}: not aligned; order the specs by `aligned`")
        end = offset + spec.num_bytes
        entry = {"dtype": dtype_name(spec.dtype), "shape": list(spec.shape), "data_offsets": [offset, end]}
        content[spec.name] = entry
        offset = end
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(spec: TensorSpec, tensor: torch.Tensor) -> memoryview:
    import torch

    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        found = f"{tensor.dtype} {list(tensor.shape)}"
        raise ValueError(f"{spec.name}: a tensor of {found} came for {spec.dtype} {list(spec.shape)}")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or what a folder says of its entries, is on the disk and survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

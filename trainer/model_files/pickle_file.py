"""Pickled checkpoints (`.ckpt`): the program in them is carried out with plain values alone, see `pickle_program`."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from trainer.errors import UserError
from trainer.guards import DEFAULT_LIMITS, Limits, Refused, open_regular, printable
from trainer.model_files.header import Header, TensorEntry
from trainer.model_files.pickle_program import BadProgram, NotTensors, StoredView, read_old_programs, read_program
from trainer.zip_guard import open_zip, read_member

if TYPE_CHECKING:
    from torch import Tensor

_MEND = "convert it to safetensors with a tool that you trust"
_PROGRAM = "data.pkl"
_LOCAL_HEADER = struct.Struct("<4s22xHH")


def read_pickle(path: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU; views of the file, which is mapped and not read.

    Raises:
        UserError: it holds other things than tensors, or is of torch's old format, or is damaged.
    """
    views, places = _described(path, limits)
    return _tensors(path, views, places)


def read_old_pickle(path: Path, limits: Limits = DEFAULT_LIMITS) -> dict[str, Tensor]:
    """As `read_pickle`, of a file that torch before 1.6 wrote, or later versions where they were asked to.

    Models of SDXL are younger, so `read_pickle` refuses such files.

    Raises:
        UserError: it is none, holds other things than tensors, or is damaged.
    """
    with _told(path), open_regular(path) as stream:
        content, keys, begin = read_old_programs(stream.read(limits.pickle_bytes))
        views = _named(path, content)
        places = _old_places(path, stream, keys, begin, views)
    return _tensors(path, views, places)


def _old_places(
    path: Path, stream: BinaryIO, keys: list[str], begin: int, views: Mapping[str, StoredView]
) -> dict[str, tuple[int, int]]:
    """Each key's data follow in the order of the keys: the number of elements in 8 bytes, and the elements."""
    import torch

    stored, places = {view.stored.key: view.stored for view in views.values()}, {}
    for key in keys:
        stream.seek(begin)
        count = int.from_bytes(stream.read(8), "little")
        if key not in stored or count != stored[key].count:
            raise BadProgram("data of another size than its tensors say")
        places[key] = (begin + 8, count * getattr(torch, stored[key].dtype).itemsize)
        begin = sum(places[key])
    if begin != path.stat().st_size:
        raise BadProgram(f"{path.stat().st_size:,} bytes where its tensors take {begin:,}")
    return places


def _tensors(path: Path, views: Mapping[str, StoredView], places: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    import torch

    if not views:
        return {}
    mapped = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return {name: _tensor(path, name, view, places, mapped) for name, view in views.items()}


def pickle_header(path: Path, limits: Limits = DEFAULT_LIMITS) -> Header:
    """What `read_pickle` finds, in the form of a safetensors header; the places of the data are not known.

    Raises:
        UserError: as `read_pickle`.
    """
    from trainer.model_files.tensor_file import dtype_name

    tensors = {
        name: TensorEntry(dtype_name(tensor.dtype), tuple(tensor.shape), 0, tensor.numel() * tensor.itemsize)
        for name, tensor in read_pickle(path, limits).items()
    }
    return Header(tensors, {}, 0, path.stat().st_size)


def _described(path: Path, limits: Limits) -> tuple[dict[str, StoredView], dict[str, tuple[int, int]]]:
    """The named tensors, and where in the file each key's bytes are: (place, number)."""
    with _told(path):
        with open_regular(path) as stream:
            start = stream.read(4)
        if start[:4] != b"PK\x03\x04":
            what = (
                "is a pickle of torch's old format, which is not read" if start[:1] == b"\x80" else "is no checkpoint"
            )
            raise UserError(f"{path}: {what}; {_MEND}")
        with open_zip(path, limits) as archive:
            folder, members = _members(path, archive)
            program = read_member(archive, folder + _PROGRAM, limits.pickle_bytes, str(path))
            places = _places(path, archive, folder + "data/", members)
        content = read_program(program)
    return _named(path, content), places


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What is wrong with a file, as a user's mistake."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read as a checkpoint: {error.strerror or error}") from None
    except NotTensors as wanted:
        raise UserError(
            f"{path}: holds more than tensors ({printable(str(wanted), 100)}); such a pickle can run any program, so "
            f"it is not opened: {_MEND}"
        ) from None
    except BadProgram as fault:
        raise UserError(f"{path}: cannot be read as a checkpoint: {printable(str(fault))}") from None


def _named(path: Path, content: object) -> dict[str, StoredView]:
    """The tensors of what was saved, by their names."""
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict):
        raise UserError(f"{path}: is a pickle of a {type(content).__name__}, not of named tensors")
    return {name: view for name, view in content.items() if isinstance(name, str) and isinstance(view, StoredView)}


def _members(path: Path, archive: zipfile.ZipFile) -> tuple[str, list[zipfile.ZipInfo]]:
    """The folder of the one program, with its slash, and the archive's members."""
    members = archive.infolist()
    programs = [info.filename for info in members if info.filename.rpartition("/")[2] == _PROGRAM]
    if len(programs) != 1:
        raise Refused(f"{path}: is a zip archive with {len(programs)} members {_PROGRAM}; a checkpoint has one")
    folder = programs[0].removesuffix(_PROGRAM)
    if folder + "byteorder" in archive.namelist():
        order = read_member(archive, folder + "byteorder", 16, str(path))
        if order != b"little":
            raise Refused(f"{path}: its numbers are in the byte order {printable(repr(order))}; wanted little")
    return folder, members


def _places(
    path: Path, archive: zipfile.ZipFile, folder: str, members: list[zipfile.ZipInfo]
) -> dict[str, tuple[int, int]]:
    places = {}
    stream = archive.fp
    assert stream is not None
    for info in members:
        if not info.filename.startswith(folder):
            continue
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise Refused(f"{path}: its member {info.filename} is packed; the weights of a checkpoint are not")
        stream.seek(info.header_offset)
        header = stream.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size or not header.startswith(b"PK\x03\x04"):
            raise Refused(f"{path}: its member {info.filename} is not where the directory says")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
        begin = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        places[info.filename.removeprefix(folder)] = (begin, info.file_size)
    return places


def _tensor(path: Path, name: str, view: StoredView, places: dict[str, tuple[int, int]], mapped: Tensor) -> Tensor:
    """One tensor, once it is sure that it lies within its own bytes and is no larger than they are."""
    import torch

    dtype = getattr(torch, view.dtype)
    begin, num_bytes = places.get(view.stored.key, (0, -1))
    told = f"{path}: {printable(name, 100)} of shape {printable(str(list(view.shape)), 100)}"
    if num_bytes < 0:
        raise UserError(f"{told} has no data in the file; it is damaged, or was made to mislead")
    elements, last = num_bytes // dtype.itemsize, view.offset
    last += sum((length - 1) * step for length, step in zip(view.shape, view.stride, strict=True))
    count = math.prod(view.shape)
    if view.offset < 0 or count > elements or (count and last >= elements) or begin + num_bytes > len(mapped):
        raise UserError(f"{told} is larger than its data in the file, {num_bytes:,} bytes; it is cut short or damaged")
    data = mapped[begin : begin + elements * dtype.itemsize]
    if data.data_ptr() % dtype.itemsize or begin % dtype.itemsize:
        data = data.clone()  # packed anew by a tool that does not align
    return data.view(dtype).as_strided(view.shape, view.stride, data.view(dtype).storage_offset() + view.offset)

"""Looks into a stored model: its parts, numbers, faults, metadata and hashes, one piece of a tensor at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.model_files.examine.block_order import block_order
from trainer.model_files.examine.float_bits import FORMATS, Faults, faults
from trainer.model_files.examine.identify import Identity, classify, identify
from trainer.model_files.examine.markers import MARKERS, Prediction, prediction
from trainer.model_files.examine.projection import Orientation, orientation
from trainer.model_files.examine.stored_tensors import (
    PIECE_BYTES,
    StoredFile,
    StoredTensor,
    read_pieces,
    stored_files,
    wanted_names,
)
from trainer.model_files.key_map import COMPONENTS, LOGIT_SCALE, POSITION_IDS
from trainer.model_files.modelspec import HASH_KEY
from trainer.model_files.pickle_file import pickle_header

_NOT_WEIGHTS = {*MARKERS, POSITION_IDS, LOGIT_SCALE}
OnBytes = Callable[[int], object]


@dataclass(frozen=True)
class Group:
    """Tensors of one component or of one block."""

    name: str
    component: str
    tensors: int
    parameters: int
    """Elements of floating-point tensors."""
    num_bytes: int
    dtypes: dict[str, int]
    """Elements of each dtype."""


@dataclass(frozen=True)
class FileReport:
    """One file; the hashes are None if it was not read."""

    path: Path
    num_bytes: int
    header_bytes: int
    tensors: int
    sha256: str | None = None
    """Of the whole file; A1111 and Civitai show its first 10 digits."""
    data_sha256: str | None = None
    """Of what follows the header, which does not change with the metadata; modelspec's hash_sha256."""


@dataclass(frozen=True)
class Numbers:
    """What reading all weights found."""

    total: Faults
    faulty: dict[str, Faults]
    """Tensors with NaN, infinite values or values beyond fp16, by name."""
    largest_in: str
    """The tensor with the largest finite magnitude."""
    all_zero: tuple[str, ...]
    """Tensors of nothing but zeros."""
    not_read: tuple[str, ...]
    """Floating-point tensors of dtypes that are not looked into."""


@dataclass(frozen=True)
class Inspection:
    """Everything that is known of a stored model."""

    path: Path
    identity: Identity
    files: tuple[FileReport, ...]
    components: tuple[Group, ...]
    blocks: tuple[Group, ...]
    """In the order in which the network computes them."""
    prediction: Prediction
    markers: tuple[str, ...]
    metadata: dict[str, str]
    missing: tuple[str, ...] | None
    """Tensors that SDXL has and this model lacks; None where it is not a whole SDXL in one file."""
    unknown: tuple[str, ...]
    """Tensors that no part of SDXL has."""
    text_projection: Orientation
    numbers: Numbers | None = None
    """None if the weights were not read."""


def inspect(
    path: Path, *, quick: bool = False, reference: Path | None = None, on_bytes: OnBytes = lambda _: None
) -> Inspection:
    """Looks into a model of any kind that `identify` knows.

    Args:
        path: a file or folder whose identity `is_readable`.
        quick: read headers only: no faults, no hashes.
        reference: a model known to be right, for the orientation of the text projection.
        on_bytes: is told how many bytes were read, as they are read.

    Raises:
        trainer.model_files.header.HeaderFault: a file is not whole.
        OSError: a file cannot be read.
    """
    found = look(path)
    files = stored_files(path, found)
    tensors = [tensor for file in files for tensor in file.tensors]
    numbers, reports = None, tuple(_file_report(file) for file in files)
    if not quick:
        numbers, reports = _read_all(files, on_bytes)
    names = {tensor.name for tensor in tensors}
    wanted = wanted_names(files) if found.kind == "sdxl" and found.layout == "single-file" else None
    metadata = {key: text for file in files for key, text in file.header.metadata.items()}
    return Inspection(
        path=path,
        identity=found,
        files=reports,
        components=_groups(tensors, lambda tensor: tensor.component),
        blocks=tuple(sorted(_groups(tensors, lambda tensor: tensor.block), key=lambda group: block_order(group.name))),
        prediction=prediction(path, found, files),
        markers=tuple(marker for marker in MARKERS if marker in names),
        metadata=metadata,
        missing=None if wanted is None else tuple(sorted(wanted - names)),
        unknown=() if wanted is None else tuple(sorted(names - wanted - _NOT_WEIGHTS)),
        text_projection=orientation(files, stored_files(reference, look(reference)) if reference else None),
        numbers=numbers,
    )


def look(path: Path) -> Identity:
    """What `identify` says; of a pickled checkpoint, what it holds.

    Raises:
        trainer.errors.UserError: a pickle that holds more than tensors.
    """
    found = identify(path)
    return classify(pickle_header(path)) if found.kind == "pickle" else found


def total_bytes(path: Path) -> int:
    """Bytes that `inspect` reads without `quick`."""
    return sum(tensor.num_bytes for file in stored_files(path, look(path)) for tensor in file.tensors)


def hash_agrees(inspection: Inspection) -> bool | None:
    """Whether the hash in the metadata is that of the data; None if there is none, or the data were not read."""
    told = inspection.metadata.get(HASH_KEY, "").lower().removeprefix("0x")
    read = inspection.files[0].data_sha256 if len(inspection.files) == 1 else None
    return None if not told or read is None else told == read


def as_json(inspection: Inspection) -> dict[str, Any]:
    """The inspection as JSON's types; the metadata as they are, but for pictures."""
    content = asdict(inspection)
    content["metadata"] = {
        key: f"({len(text):,} characters)" if text.startswith("data:") else text
        for key, text in inspection.metadata.items()
    }
    content["hash_agrees"] = hash_agrees(inspection)
    content["path"] = str(inspection.path)
    for report in content["files"]:
        report["path"] = str(report["path"])
    return content


def _groups(tensors: Iterable[StoredTensor], key: Callable[[StoredTensor], str]) -> tuple[Group, ...]:
    members: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        members.setdefault(key(tensor), []).append(tensor)
    return tuple(sorted((_group(name, own) for name, own in members.items()), key=lambda group: _place(group.name)))


def _group(name: str, tensors: list[StoredTensor]) -> Group:
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.count
    return Group(
        name=name,
        component=tensors[0].component,
        tensors=len(tensors),
        parameters=sum(tensor.count for tensor in tensors if tensor.dtype in FORMATS),
        num_bytes=sum(tensor.num_bytes for tensor in tensors),
        dtypes=dtypes,
    )


def _place(component: str) -> int:
    return COMPONENTS.index(component) if component in COMPONENTS else len(COMPONENTS)


def _file_report(file: StoredFile, sha256: str | None = None, data_sha256: str | None = None) -> FileReport:
    header = file.header
    return FileReport(file.path, header.file_bytes, header.data_begin, len(header.tensors), sha256, data_sha256)


def _read_all(files: tuple[StoredFile, ...], on_bytes: OnBytes) -> tuple[Numbers, tuple[FileReport, ...]]:
    """Every byte of the files once, in order: two hashes in threads beside the count of faults."""
    by_tensor: dict[str, Faults] = {}
    not_read: list[str] = []
    reports = []
    with ThreadPoolExecutor(2) as pool:
        for file in files:
            whole, data = hashlib.sha256(), hashlib.sha256()
            with file.path.open("rb") as stream:
                whole.update(stream.read(file.header.data_begin))
            for tensor in file.tensors:
                found = Faults()
                for piece in read_pieces(tensor):
                    jobs = [pool.submit(digest.update, piece) for digest in (whole, data)]
                    if tensor.dtype in FORMATS:
                        found += faults(piece, tensor.dtype)
                    for job in jobs:
                        job.result()
                    on_bytes(len(piece))
                if tensor.dtype in FORMATS:
                    by_tensor[tensor.name] = found
                elif tensor.dtype.startswith("F"):
                    not_read.append(tensor.name)
            if file.header.data_begin:
                reports.append(_file_report(file, whole.hexdigest(), data.hexdigest()))
            else:
                reports.append(_file_report(file, _file_sha256(file.path)))  # a pickle: its tensors lie anywhere in it
    counts = {tensor.name: tensor.count for file in files for tensor in file.tensors}
    return _numbers(by_tensor, not_read, counts), tuple(reports)


def _file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _numbers(by_tensor: dict[str, Faults], not_read: list[str], counts: dict[str, int]) -> Numbers:
    total = sum(by_tensor.values(), Faults())
    return Numbers(
        total=total,
        faulty={name: found for name, found in by_tensor.items() if found.nan or found.infinite or found.beyond_fp16},
        largest_in=max(by_tensor, key=lambda name: by_tensor[name].largest, default=""),
        all_zero=tuple(
            name
            for name, found in by_tensor.items()
            if counts[name] and not found.largest and not found.nan and not found.infinite
        ),
        not_read=tuple(not_read),
    )

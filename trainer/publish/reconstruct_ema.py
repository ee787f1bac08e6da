"""An average of any length from a run's stored ones, tensor by tensor (Karras et al. 2024, section 3.2).

The paper stores fp16. Its rounding, 2e-4 of a weight, comes out times `Reconstruction.amplification`: where training
moves weights by no more than a few thousandths, as a fine-tune may, fp32 is worth its bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.model_files.components import ComponentTensor
from trainer.model_files.header import Header, HeaderFault, TensorEntry, read_header
from trainer.model_files.tensor_file import TensorSpec, aligned, read_tensor, torch_dtype, write_tensor_file
from trainer.optim.ema_profile import MAX_SIGMA_REL, ProfileAt, Reconstruction, reconstruction_weights

_PIECE_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class StoredAverage:
    """A safetensors file that holds a power-function average as it was after a step.

    Attributes:
        step: counted from where the average began.
        sigma_rel: its length.
    """

    path: Path
    step: int
    sigma_rel: float


def plan_reconstruction(
    stored: Sequence[StoredAverage], sigma_rel: float, step: int | None = None
) -> tuple[list[StoredAverage], Reconstruction]:
    """The averages that go into the one of length `sigma_rel` after `step`, and how; reads no file.

    Args:
        step: None: the last one that is stored. Averages of later steps are left out.

    Raises:
        UserError: the length is out of range, or nothing is stored up to the step.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL:
        raise UserError(f"length = {sigma_rel:g}: must be above 0 and below {MAX_SIGMA_REL:.3f}")
    last = max((each.step for each in stored), default=0) if step is None else step
    used = [each for each in stored if each.step <= last]
    if not used:
        until = "" if step is None else f" up to step {step}"
        raise UserError(f"no power-function average is stored{until}, from which another could be computed")
    profiles = [ProfileAt(each.step, each.sigma_rel) for each in used]
    return used, reconstruction_weights(profiles, ProfileAt(last, sigma_rel))


def combined_tensors(files: Sequence[Path], weights: Sequence[float]) -> dict[str, ComponentTensor]:
    """The weighted sum of all files' tensors of each name, in fp32, computed in float64 when it is read.

    A read takes memory for its own tensor alone, and a few MB beside.

    Raises:
        UserError: a file is damaged, or has other tensors than the first.
    """
    headers = [_header(file) for file in files]
    for file, header in zip(files, headers, strict=True):
        _require_same(files[0], headers[0], file, header)
    tensors = {}
    for name, entry in headers[0].tensors.items():
        stored = [(file, header.tensors[name]) for file, header in zip(files, headers, strict=True)]
        meta = torch.empty(entry.shape, dtype=torch.float32, device="meta")
        tensors[name] = ComponentTensor("F32", meta, partial(_weighted_sum, stored, list(weights)))
    return tensors


def write_reconstruction(
    stored: Sequence[StoredAverage],
    sigma_rel: float,
    out: Path,
    *,
    step: int | None = None,
    dtype: str = "F32",
    metadata: Mapping[str, str] | None = None,
    on_written: Callable[[int], None] | None = None,
) -> Reconstruction:
    """Write the average of length `sigma_rel` as a safetensors file with the names of the stored ones.

    Args:
        step, stored: see `plan_reconstruction`; each file has the same tensors.
        dtype: safetensors' name of the dtype that is written.
        on_written: told of every tensor's bytes.

    Raises:
        UserError: see `plan_reconstruction` and `combined_tensors`.
        OSError: the disk is full or gone; nothing is left behind.
    """
    used, found = plan_reconstruction(stored, sigma_rel, step)
    tensors = combined_tensors([each.path for each in used], found.weights.tolist())
    wanted = torch_dtype(dtype)
    specs = aligned([TensorSpec(name, wanted, tuple(tensor.meta.shape)) for name, tensor in tensors.items()])
    values = (tensors[spec.name].read().to(wanted) for spec in specs)
    write_tensor_file(out, specs, values, {"format": "pt", **(metadata or {})}, on_written=on_written)
    return found


def _weighted_sum(stored: Sequence[tuple[Path, TensorEntry]], weights: Sequence[float]) -> Tensor:
    """Some elements of all files at a time: buffers of the size of a tensor would leave holes in the heap."""
    first = stored[0][1]
    result = torch.empty(first.count, dtype=torch.float32)
    for begin in range(0, first.count, _PIECE_ELEMENTS):
        piece = result[begin : begin + _PIECE_ELEMENTS]
        total = torch.zeros(len(piece), dtype=torch.float64)
        for (file, entry), weight in zip(stored, weights, strict=True):
            value = read_tensor(file, _some_of(entry, begin, len(piece)))
            total.add_(value.double(), alpha=weight)
        piece.copy_(total)
    return result.view(first.shape)


def _some_of(entry: TensorEntry, begin: int, count: int) -> TensorEntry:
    itemsize = entry.num_bytes // entry.count
    return TensorEntry(entry.dtype, (count,), entry.begin + begin * itemsize, count * itemsize)


def _header(file: Path) -> Header:
    try:
        return read_header(file)
    except HeaderFault as fault:
        raise UserError(f"{file}: is {fault.description}") from None


def _require_same(first: Path, header: Header, file: Path, other: Header) -> None:
    shapes, others = ({name: each.shape for name, each in h.tensors.items()} for h in (header, other))
    differing = sorted(name for name in shapes.keys() | others.keys() if shapes.get(name) != others.get(name))
    if differing:
        raise UserError(f"{file}: {differing[0]} is not as in {first}: both must be averages of one run")

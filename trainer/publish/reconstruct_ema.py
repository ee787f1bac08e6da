"""An average of any length from a run's stored ones, tensor by tensor (Karras et al. 2024, section 3.2)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainer.errors import UserError
from trainer.model_files.components import PartTensor
from trainer.model_files.header import Header, HeaderFault, read_header
from trainer.model_files.tensor_file import TensorSpec, aligned, read_tensor, torch_dtype, write_tensor_file
from trainer.optim.ema_profile import MAX_SIGMA_REL, ProfileAt, Reconstruction, reconstruction_weights


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


def combined_tensors(files: Sequence[Path], weights: Sequence[float]) -> dict[str, PartTensor]:
    """The weighted sum of all files' tensors of each name, in fp32, computed in float64 when it is read.

    A read takes memory for its own tensor alone: its float64 sum and one file's values.

    Raises:
        UserError: a file is damaged, or has other tensors than the first.
    """
    headers = [_header(file) for file in files]
    for file, header in zip(files, headers, strict=True):
        _require_same(files[0], headers[0], file, header)
    tensors = {}
    for name, entry in headers[0].tensors.items():
        reads = [partial(read_tensor, f, header.tensors[name]) for f, header in zip(files, headers, strict=True)]
        meta = torch.empty(entry.shape, dtype=torch.float32, device="meta")
        tensors[name] = PartTensor("F32", meta, partial(_weighted_sum, reads, [float(weight) for weight in weights]))
    return tensors


def write_reconstruction(
    stored: Sequence[StoredAverage],
    sigma_rel: float,
    out: Path,
    *,
    step: int | None = None,
    dtype: str = "F32",
    metadata: Mapping[str, str] | None = None,
) -> Reconstruction:
    """Write the average of length `sigma_rel` as a safetensors file with the names of the stored ones.

    Args:
        step, stored: see `plan_reconstruction`; each file has the same tensors.
        dtype: safetensors' name of the dtype that is written.

    Raises:
        UserError: see `plan_reconstruction` and `combined_tensors`.
        OSError: the disk is full or gone; nothing is left behind.
    """
    used, found = plan_reconstruction(stored, sigma_rel, step)
    tensors = combined_tensors([each.path for each in used], found.weights.tolist())
    wanted = torch_dtype(dtype)
    specs = aligned([TensorSpec(name, wanted, tuple(tensor.meta.shape)) for name, tensor in tensors.items()])
    values = (tensors[spec.name].read().to(wanted) for spec in specs)
    write_tensor_file(out, specs, values, {"format": "pt", **(metadata or {})})
    return found


def _weighted_sum(reads: Sequence[Callable[[], Tensor]], weights: Sequence[float]) -> Tensor:
    total = reads[0]().double().mul_(weights[0])
    for read, weight in zip(reads[1:], weights[1:], strict=True):
        total.add_(read().double().mul_(weight))
    return total.float()


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

"""Which way the second text encoder's projection stands in a file: as published, or transposed; numpy alone.

SDXL computes x @ P, and P is square, so that a file with the transpose of P loads without complaint and conditions
wrongly. Nothing in one square matrix says which way it stands: shape and names tell where they can, and a file known
to be right tells the rest, since fine-tuning moves P little.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trainer.model_files.components import PROJECTION_KEY
from trainer.model_files.examine.float_bits import FORMATS, values
from trainer.model_files.examine.stored_tensors import StoredFile, StoredTensor, read_pieces
from trainer.model_files.key_map import LOGIT_SCALE, LOGIT_SCALE_VALUE, TEXT_ENCODER_2_PREFIX, TEXT_PROJECTION

_AS_LINEAR = TEXT_PROJECTION + ".weight"  # written by tools that save a Linear's weight
_RELATED = 0.7  # independent matrices of equal norm lie sqrt(2) apart


@dataclass(frozen=True)
class Orientation:
    """What is known of a model's text projection."""

    verdict: str
    """`correct`, `transposed`, `unknown`, or `missing`."""
    reason: str
    """One line that says how it is known, or why not."""


def orientation(files: tuple[StoredFile, ...], reference: tuple[StoredFile, ...] | None = None) -> Orientation:
    """Whether a single file's `text_projection` is the P of x @ P, or a folder's the transpose of that.

    Args:
        reference: a model of the same family that is known to be right.
    """
    own = _find(files)
    if own is None:
        return Orientation("missing", "there is no text projection")
    if reference is not None:
        return _against(own, _find(reference))
    if own.name == _AS_LINEAR:
        return Orientation("transposed", f"the name {_AS_LINEAR} is a Linear's, whose weight is the transpose")
    width = _width(files)
    shape = own.shape[::-1] if own.is_transposed else own.shape
    if width is not None and len(shape) == 2 and shape[0] != shape[1]:
        if shape[0] == width:
            return Orientation("correct", f"{shape[0]} x {shape[1]}: takes the encoder's {width} channels")
        return Orientation("transposed", f"{shape[0]} x {shape[1]}: the encoder's {width} channels come second")
    told = files[0].header.metadata.get(PROJECTION_KEY)
    if told == "correct":
        return Orientation("correct", f"as this trainer's export says in its metadata ({PROJECTION_KEY})")
    if told == "kohya":
        return Orientation("transposed", f"exported for kohya's scripts, as the metadata say ({PROJECTION_KEY})")
    hint = _logit_scale_hint(files)
    return Orientation(
        "unknown",
        f"a square matrix does not say which way it stands{hint}; compare it with --reference FILE",
    )


def _find(files: tuple[StoredFile, ...]) -> StoredTensor | None:
    names = (TEXT_PROJECTION, _AS_LINEAR)
    return next((tensor for file in files for tensor in file.tensors if tensor.name in names), None)


def _width(files: tuple[StoredFile, ...]) -> int | None:
    """Width of the second text encoder."""
    name = TEXT_ENCODER_2_PREFIX + "ln_final.weight"
    return next((tensor.shape[0] for file in files for tensor in file.tensors if tensor.name == name), None)


def _logit_scale_hint(files: tuple[StoredFile, ...]) -> str:
    """A constant that differs from the published one shows a writer with habits of its own."""
    found = next((tensor for file in files for tensor in file.tensors if tensor.name == LOGIT_SCALE), None)
    if found is None or found.count != 1 or found.dtype not in FORMATS:
        return ""
    scale = float(_matrix(found).reshape(-1)[0])
    if abs(scale - LOGIT_SCALE_VALUE) < 0.01:
        return ""
    return f" (logit_scale is {scale:.4g}, published is {LOGIT_SCALE_VALUE}: another tool wrote it)"


def _against(own: StoredTensor, reference: StoredTensor | None) -> Orientation:
    if reference is None:
        return Orientation("unknown", "the reference has no text projection")
    ours, theirs = _matrix(own), _matrix(reference)
    norm = float(np.linalg.norm(theirs)) or 1.0
    straight, turned = (
        float(np.linalg.norm(matrix - theirs)) / norm if matrix.shape == theirs.shape else np.inf
        for matrix in (ours, ours.T)
    )
    told = f"relative distance to the reference {straight:.3g}, of its transpose {turned:.3g}"
    if not min(straight, turned) < _RELATED:
        return Orientation("unknown", f"not of the reference's family ({told})")
    if straight == turned:
        return Orientation("unknown", f"the same both ways ({told})")
    return Orientation("correct" if straight < turned else "transposed", told)


def _matrix(tensor: StoredTensor) -> np.ndarray:
    """The whole tensor as float32, as a single file has it."""
    if tensor.dtype not in FORMATS:
        return np.full(tensor.shape, np.nan, np.float32)
    matrix = np.concatenate([values(piece, tensor.dtype) for piece in read_pieces(tensor)]).reshape(tensor.shape)
    return matrix.T if tensor.is_transposed else matrix

"""What differs between two stored models, block by block, whatever their layouts and dtypes; numpy alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.model_files.examine.block_order import block_order
from trainer.model_files.examine.float_bits import FORMATS, rounded, values
from trainer.model_files.examine.identify import Identity
from trainer.model_files.examine.inspection import look
from trainer.model_files.examine.projection import Orientation, orientation
from trainer.model_files.examine.stored_tensors import (
    StoredTensor,
    block_by_name,
    read_pieces,
    split_stacked,
    stored_files,
)
from trainer.model_files.key_map import COMPONENTS, LOGIT_SCALE

_PIECE_VALUES = 1 << 20
OnBytes = Callable[[int], object]


@dataclass(frozen=True)
class Change:
    """How far B's weights are from A's, in one tensor, block or component.

    Attributes:
        changed: weights that differ. Where the dtypes do, both are rounded to the coarser one first, so that
            writing a model in another dtype changes nothing.
        squared_a, squared_difference: sums of squares of A's weights, and of B's minus A's.
        not_finite: weights that are NaN or infinite in A or B, and left out of the sums.
    """

    name: str
    component: str
    weights: int
    changed: int
    squared_a: float
    squared_difference: float
    not_finite: int

    @property
    def relative(self) -> float:
        """||B - A|| / ||A||; infinite where A is all zeros and B is not."""
        if not self.squared_difference:
            return 0.0
        return math.sqrt(self.squared_difference / self.squared_a) if self.squared_a else math.inf

    @property
    def changed_share(self) -> float:
        """Share of the weights that differ."""
        return self.changed / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Comparison:
    """Two models, A and B, side by side."""

    path_a: Path
    path_b: Path
    identity_a: Identity
    identity_b: Identity
    tensors: tuple[Change, ...]
    """Those that both have, in the network's order; of a stacked tensor its three parts."""
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    other_shape: tuple[str, ...]
    """Tensors of both whose sizes differ: they are not compared."""
    dtypes: tuple[tuple[str, ...], tuple[str, ...]]
    """Of the compared tensors of A and of B."""
    text_projection: Orientation
    """Of B's, with A as the reference."""

    @property
    def blocks(self) -> tuple[Change, ...]:
        """Sums over the tensors of each block, in the network's order."""
        return _summed(self.tensors, [block_by_name(change.name) for change in self.tensors])

    @property
    def components(self) -> tuple[Change, ...]:
        """Sums over the tensors of each component."""
        found = _summed(self.tensors, [change.component for change in self.tensors])
        order = [*COMPONENTS, "other"]
        return tuple(sorted(found, key=lambda change: order.index(change.component)))

    @property
    def total(self) -> Change:
        """Sums over all tensors."""
        return _sum("all", "all", self.tensors)


def compare(path_a: Path, path_b: Path, *, on_bytes: OnBytes = lambda _: None) -> Comparison:
    """Compares the tensors that two models share, one piece at a time.

    Args:
        path_a, path_b: files or folders whose identities are readable.
        on_bytes: is told how many of A's bytes were compared, as they are.

    Raises:
        trainer.model_files.header.HeaderFault: a file is not whole.
        OSError: a file cannot be read.
    """
    found_a, found_b = look(path_a), look(path_b)
    files_a, files_b = stored_files(path_a, found_a), stored_files(path_b, found_b)
    a, b = (_by_name(t for file in files for t in file.tensors) for files in (files_a, files_b))
    shared = [name for name in a if name in b]
    other_shape = [name for name in shared if _plain_shape(a[name]) != _plain_shape(b[name])]
    compared = sorted(set(shared) - set(other_shape), key=lambda name: (block_order(block_by_name(name)), name))
    changes = []
    for name in compared:
        changes.append(_compared(a[name], b[name]))
        on_bytes(a[name].num_bytes)
    return Comparison(
        path_a=path_a,
        path_b=path_b,
        identity_a=found_a,
        identity_b=found_b,
        tensors=tuple(changes),
        only_a=tuple(sorted(a.keys() - b.keys())),
        only_b=tuple(sorted(b.keys() - a.keys())),
        other_shape=tuple(sorted(other_shape)),
        dtypes=(_dtypes(a[name] for name in compared), _dtypes(b[name] for name in compared)),
        text_projection=orientation(files_b, files_a),
    )


def comparable_bytes(path_a: Path, path_b: Path) -> int:
    """Bytes of A's tensors that `compare` reads."""
    a, b = (_by_name(t for file in stored_files(p, look(p)) for t in file.tensors) for p in (path_a, path_b))
    return sum(tensor.num_bytes for name, tensor in a.items() if name in b)


def largest_changes(comparison: Comparison, count: int) -> tuple[Change, ...]:
    """The tensors that make up most of ||B - A||, the largest first."""
    changed = [change for change in comparison.tensors if change.squared_difference]
    return tuple(sorted(changed, key=lambda change: -change.squared_difference)[:count])


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON's types."""

    def told(change: Change) -> dict[str, Any]:
        relative = change.relative if math.isfinite(change.relative) else None
        return asdict(change) | {"relative": relative, "changed_share": change.changed_share}

    return {
        "a": {"path": str(comparison.path_a)} | asdict(comparison.identity_a),
        "b": {"path": str(comparison.path_b)} | asdict(comparison.identity_b),
        "total": told(comparison.total),
        "components": [told(change) for change in comparison.components],
        "blocks": [told(change) for change in comparison.blocks],
        "tensors": [told(change) for change in comparison.tensors],
        "only_a": comparison.only_a,
        "only_b": comparison.only_b,
        "other_shape": comparison.other_shape,
        "dtypes": comparison.dtypes,
        "text_projection": asdict(comparison.text_projection),
    }


def _by_name(tensors: Iterable[StoredTensor]) -> dict[str, StoredTensor]:
    """Tensors of numbers that were learnt, stacked ones in their parts."""
    parts = (part for tensor in tensors if tensor.dtype in FORMATS for part in split_stacked(tensor))
    return {part.name: part for part in parts if part.count and part.name != LOGIT_SCALE}


def _plain_shape(tensor: StoredTensor) -> tuple[int, ...]:
    """The shape in a single file, without the axes of 1 that a convolution has over a linear layer."""
    shape = tensor.shape[::-1] if tensor.is_transposed else tensor.shape
    return tuple(size for size in shape if size != 1)


def _dtypes(tensors: Iterable[StoredTensor]) -> tuple[str, ...]:
    return tuple(sorted({tensor.dtype for tensor in tensors}))


def _compared(a: StoredTensor, b: StoredTensor) -> Change:
    finer, coarser = (a, b) if FORMATS[a.dtype].mantissa > FORMATS[b.dtype].mantissa else (b, a)
    changed, not_finite, squared_a, squared = 0, 0, 0.0, 0.0
    for of_a, of_b in _value_pairs(a, b):
        if a.dtype != b.dtype:
            # Rounding the coarser one again would do nothing.
            of_a, of_b = (rounded(x, coarser.dtype) if finer is t else x for t, x in ((a, of_a), (b, of_b)))
        with np.errstate(invalid="ignore"):
            difference = of_b - of_a
        finite = np.isfinite(difference)
        if not finite.all():
            not_finite += int(np.count_nonzero(~finite))
            of_a, difference = of_a[finite], difference[finite]
        changed += int(np.count_nonzero(difference))
        squared_a += _squared(of_a)
        squared += _squared(difference)
    return Change(a.name, a.component, a.count, changed, squared_a, squared, not_finite)


def _squared(numbers: np.ndarray) -> float:
    """The sum of squares, in float64: float32 sums are off by 1e-5."""
    precise = numbers.astype(np.float64)  # then dot: five times as fast as np.square(..., dtype=float64)
    return float(np.dot(precise, precise))


def _value_pairs(a: StoredTensor, b: StoredTensor) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pieces of both tensors as numbers, element by element the same weights."""
    if a.is_transposed == b.is_transposed:
        # As many values, not as many bytes, so that pieces of different dtypes meet.
        pieces = [
            read_pieces(tensor, _PIECE_VALUES * np.dtype(FORMATS[tensor.dtype].bits).itemsize) for tensor in (a, b)
        ]
        for of_a, of_b in zip(*pieces, strict=True):
            numbers = values(of_a, a.dtype)
            yield numbers, numbers if a.dtype == b.dtype and of_a == of_b else values(of_b, b.dtype)
        return
    # The text projection alone: small enough to be turned as a whole.
    whole_a, whole_b = (
        np.concatenate([values(piece, tensor.dtype) for piece in read_pieces(tensor)]).reshape(tensor.shape)
        for tensor in (a, b)
    )
    yield whole_a.reshape(-1), np.ascontiguousarray(whole_b.T).reshape(-1)


def _summed(changes: tuple[Change, ...], names: list[str]) -> tuple[Change, ...]:
    members: dict[str, list[Change]] = {}
    for change, name in zip(changes, names, strict=True):
        members.setdefault(name, []).append(change)
    return tuple(_sum(name, own[0].component, own) for name, own in members.items())


def _sum(name: str, component: str, changes: Iterable[Change]) -> Change:
    own = list(changes)
    return Change(
        name=name,
        component=component,
        weights=sum(change.weights for change in own),
        changed=sum(change.changed for change in own),
        squared_a=math.fsum(change.squared_a for change in own),
        squared_difference=math.fsum(change.squared_difference for change in own),
        not_finite=sum(change.not_finite for change in own),
    )

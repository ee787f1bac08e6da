"""Which bytes of a safetensors file each worker writes, so that all together write it without an exchange.

The layout of a file follows from its tensors' names, shapes and dtypes alone. Of the workers that share
a disk, rows that only one has are written by that one; what several or all have is cut into as many equal stretches, of
which each writes one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

from trainer.checkpoint.write import TensorFile
from trainer.model_files.tensor_file import TensorSpec, aligned, header_of
from trainer.parallel.local_shard import Held

PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of a tensor, and where they go.

    Attributes:
        name: of the tensor.
        held: what this worker has of it.
        begin, end: the elements, counted within that.
        offset: of the first one in the file, in bytes.
    """

    name: str
    held: Held
    begin: int
    end: int
    offset: int

    @property
    def num_bytes(self) -> int:
        """As they are written."""
        return (self.end - self.begin) * self.held.dtype.itemsize

    def elements(self) -> Tensor:
        """As they are now, one-dimensional, on their device; of weights in another memory layout, a copy."""
        elements = self.held.part.reshape(-1)[self.begin : self.end]
        if self.held.blend is None:
            return elements
        towards, by = self.held.blend
        return elements.float().lerp(towards.reshape(-1)[self.begin : self.end].to(elements.device), by)


@dataclass(frozen=True)
class FileLayout:
    """A file before it is written.

    Attributes:
        header: its first bytes, which the first worker writes.
        num_bytes: of the whole file.
        pieces: this worker's.
        offsets: where each tensor begins, in bytes, in their order in the file.
    """

    header: bytes
    num_bytes: int
    pieces: tuple[Piece, ...]
    offsets: Mapping[str, int]


def lay_out(file: TensorFile, rank: int, workers: range) -> FileLayout:
    """The layout of `file`, with the pieces that worker `rank` writes; `workers`: the ranks of those on its disk."""
    specs, header = _head(file)
    place, count = workers.index(rank), len(workers)
    shared_bytes = sum(spec.num_bytes for spec in specs if not file.tensors[spec.name].is_share)
    mine = (shared_bytes * place // count, shared_bytes * (place + 1) // count)
    offset, shared_before, pieces, offsets = len(header), 0, [], dict[str, int]()
    for spec in specs:
        held, offsets[spec.name] = file.tensors[spec.name], offset
        if held.is_share:
            first = held.first_row * prod(held.shape[1:])
            size = held.part.numel()
            # Of the workers that have these rows, those of other disks write them there.
            here = [holder for holder in held.holders if holder in workers] or [rank]
            begin, end = (size * bound // len(here) for bound in (here.index(rank), here.index(rank) + 1))
            pieces += _cut(spec.name, held, begin, end, offset + (first + begin) * held.dtype.itemsize)
        else:
            begin, end = (_elements_before(bound - shared_before, spec) for bound in mine)
            pieces += _cut(spec.name, held, begin, end, offset + begin * held.dtype.itemsize)
            shared_before += spec.num_bytes
        offset += spec.num_bytes
    return FileLayout(header, offset, tuple(pieces), offsets)


def size_of(file: TensorFile) -> int:
    """Bytes of the whole file."""
    specs, header = _head(file)
    return len(header) + sum(spec.num_bytes for spec in specs)


def _head(file: TensorFile) -> tuple[list[TensorSpec], bytes]:
    """Its tensors in their order in the file, and its first bytes."""
    specs = aligned([TensorSpec(name, held.dtype, held.shape) for name, held in file.tensors.items()])
    return specs, header_of(specs, {"format": "pt"})


def _elements_before(num_bytes: int, spec: TensorSpec) -> int:
    """How many elements of a tensor begin before byte `num_bytes` of it; all workers cut at the same ones."""
    return min(max(-(-num_bytes // spec.dtype.itemsize), 0), prod(spec.shape))


def _cut(name: str, held: Held, begin: int, end: int, offset: int) -> Iterator[Piece]:
    """Elements `begin` to `end` of what is held, of which the first goes to `offset`, in pieces of a bounded size."""
    for first, last, place in stretches(begin, end, offset, held.dtype.itemsize):
        yield Piece(name, held, first, last, place)


def stretches(begin: int, end: int, offset: int, item_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Elements `begin` to `end` in pieces of a bounded size: first, last, and where the first goes, in bytes."""
    step = PIECE_BYTES // item_bytes
    for first in range(begin, end, step):
        yield first, min(first + step, end), offset + (first - begin) * item_bytes


def bytes_of(layouts: Sequence[FileLayout]) -> int:
    """What this worker writes of some files."""
    return sum(piece.num_bytes for layout in layouts for piece in layout.pieces)

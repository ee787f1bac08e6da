"""The tensors of one of DDP's buckets as rows of numbers: each begins a row of its own, zeros fill its last one up."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from trainer.wire.row_codecs import first_id


class BucketRows:
    """Where the tensors of a bucket lie among rows, whose number is a multiple of the workers'."""

    def __init__(self, sizes: Mapping[str, int], block: int, world: int, device: torch.device) -> None:
        """`sizes`: elements of each tensor, by its name, in the order of the bucket."""
        self.block, self.names = block, tuple(sizes)
        self._sizes = tuple(sizes.values())
        counts = [-(-size // block) for size in self._sizes]
        self.num_rows = -(-sum(counts) // world) * world
        ids = torch.zeros(self.num_rows, dtype=torch.int32)
        self._begins: list[int] = []
        begin = 0
        for name, count in zip(self.names, counts, strict=True):
            self._begins.append(begin * block)
            ids[begin : begin + count] = torch.arange(count, dtype=torch.int32) + first_id(name)
            begin += count
        self.ids = ids.to(device)
        """Of the rows, int32 [num_rows]; what is drawn for a row is a function of it."""

    def empty(self) -> Tensor:
        """fp32 zeros, [num_rows, block]."""
        return torch.zeros(self.num_rows, self.block, device=self.ids.device)

    def parts(self, rows: Tensor) -> list[Tensor]:
        """The elements of each tensor among `rows`, flat views."""
        flat = rows.view(-1)
        return [flat[begin : begin + size] for begin, size in zip(self._begins, self._sizes, strict=True)]

    def fill(self, rows: Tensor, tensors: Sequence[Tensor]) -> None:
        """Put tensors in, contiguous ones of any dtype."""
        torch._foreach_copy_(self.parts(rows), _flat(tensors))  # pyright: ignore[reportPrivateImportUsage]

    def add(self, rows: Tensor, tensors: Sequence[Tensor]) -> None:
        """Add tensors to what is in the rows."""
        for part, tensor in zip(self.parts(rows), _flat(tensors), strict=True):
            part += tensor

    def take(self, rows: Tensor, tensors: Sequence[Tensor]) -> None:
        """Put what is in the rows into tensors, rounded to their dtype."""
        torch._foreach_copy_(_flat(tensors), self.parts(rows))  # pyright: ignore[reportPrivateImportUsage]


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.view(-1) for tensor in tensors]

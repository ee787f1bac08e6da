"""This worker's part of a tensor that may be sharded (FSDP2), and where in the whole it lies."""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


class Blend(NamedTuple):
    """What is written in place of some rows: rows + `by` x (`towards` - rows), in fp32."""

    towards: Tensor
    by: float


class Held(NamedTuple):
    """What this worker has of a tensor, in the memory where it is.

    Attributes:
        part: all of it, or this worker's rows.
        first_row: the number of the first of them within the whole tensor.
        shape: of the whole.
        is_share: the other workers have other rows; else all have the same.
        dtype: in which it is to be written, if not in its own.
        blend: what is to be written in place of it; None: itself.
        holders: of rows that several workers have: the ranks of all that do, in order; none: this worker alone.
    """

    part: Tensor
    first_row: int
    shape: tuple[int, ...]
    is_share: bool
    dtype: torch.dtype
    blend: Blend | None = None
    holders: tuple[int, ...] = ()


def held(tensor: Tensor) -> Held:
    """What this worker has of `tensor`; nothing is copied."""
    part, first_row = local_part(tensor.detach())
    return Held(part, first_row, tuple(tensor.shape), _is_cut(tensor), part.dtype, None, _holders(tensor))


def held_like(part: Tensor, like: Tensor) -> Held:
    """`part` as what this worker has of a tensor that is cut as the parameter `like` is; rows of both correspond."""
    _, first_row = local_part(like)
    shape = (*like.shape[:1], *part.shape[1:])
    return Held(part, first_row, shape, _is_cut(like), part.dtype, None, _holders(like))


def _is_cut(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and not all(place.is_replicate() for place in tensor.placements)


def _holders(tensor: Tensor) -> tuple[int, ...]:
    """Ranks of the workers that have the same rows as this one, if several have."""
    if not isinstance(tensor, DTensor) or tensor.device_mesh.ndim == 1:  # then nothing is looked up
        return ()
    return _replicas(tensor.device_mesh, tuple(place.is_replicate() for place in tensor.placements))


@cache
def _replicas(mesh: DeviceMesh, replicated: tuple[bool, ...]) -> tuple[int, ...]:
    """Ranks of the workers at this one's place of a mesh, but for the dimensions along which all have the same."""
    own = mesh.get_coordinate()
    assert own is not None
    places = zip(own, replicated, strict=True)
    ranks = mesh.mesh[tuple(slice(None) if is_replicated else place for place, is_replicated in places)]
    return tuple(sorted(ranks.flatten().tolist()))


def sharers(tensor: Tensor) -> tuple[dist.ProcessGroup | None, int]:
    """The workers that together hold all rows once, this one among them, and how many; (None, 1): it has all rows."""
    if not isinstance(tensor, DTensor) or not _is_cut(tensor):
        return None, 1
    dim = next(dim for dim, place in enumerate(tensor.placements) if not place.is_replicate())
    return tensor.device_mesh.get_group(dim), tensor.device_mesh.size(dim)


def local_part(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows that this worker holds, and the number of the first of them within the whole tensor.

    Raises:
        ValueError: sharded along another dimension than the first, or twice.
    """
    if not isinstance(tensor, DTensor):
        return tensor, 0
    return tensor.to_local(), _first_row(tensor)


def _first_row(tensor: DTensor) -> int:
    cuts = [(dim, place) for dim, place in enumerate(tensor.placements) if not place.is_replicate()]
    if not cuts:
        return 0
    (mesh_dim, placement), *others = cuts
    if others or not isinstance(placement, Shard) or placement.dim != 0:
        raise ValueError(f"placements {tensor.placements} of a parameter: only rows can be sharded, and once")
    workers, mine = tensor.device_mesh.size(mesh_dim), tensor.device_mesh.get_local_rank(mesh_dim)
    rows = tensor.shape[0]
    return min(mine * -(-rows // workers), rows)


def whole_of(part: Tensor, like: Tensor) -> Tensor:
    """`part` as a shard of a whole that is cut as the parameter `like` is; rows of both correspond."""
    if not isinstance(like, DTensor) or isinstance(part, DTensor) or part.ndim == 0:
        return part
    shape = torch.Size([like.shape[0], *part.shape[1:]])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This worker's rows of `value`, which is whole, or sharded as the parameter `like` is, or already those rows."""
    if isinstance(value, DTensor):
        return value.to_local()
    if not isinstance(like, DTensor) or value.ndim == 0 or value.shape[0] != like.shape[0]:
        return value
    part, first_row = local_part(like)
    return value[first_row : first_row + part.shape[0]]

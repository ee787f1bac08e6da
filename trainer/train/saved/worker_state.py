"""What a checkpoint holds of workers that take steps each by itself: what is not the same on all, and the average's.

The components' files have the weights of the latest average, which all have in common; `optimizer.safetensors` has the
first worker's state, as that of a run whose workers share each step. Beside them, in `workers.safetensors`:

    momentum.NAME        of the common weights, fp32
    common.NAME          these in fp32, where weights are narrower
    pending.NAME         a mean difference that takes effect in a later step, fp32
    weight.NAME          [workers, *shape] each worker's own weights, unless they are the common ones
    optimizer.NAME.KEY   [workers - 1, *shape] the state of all but the first

So a run may be saved after any step, and goes on to the bit with as many workers.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trainer.checkpoint.write import OPTIMIZER, WORKERS, TensorFile, read_tensors
from trainer.errors import UserError
from trainer.parallel.comm import Comm
from trainer.parallel.local_shard import Held, held
from trainer.parallel.sharding import copy_share
from trainer.parallel.strategy import Outer, Strategy

_log = logging.getLogger(__name__)
_MOMENTUM, _COMMON, _PENDING, _WEIGHT, _STATE = "momentum.", "common.", "pending.", "weight.", "optimizer."


def common_weights(outer: Outer, weights: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Held]:
    """A component's weights as all workers have them in common, in the weights' dtype; `names`: in the model."""
    return {
        stored: held(outer.common[names[stored]])._replace(dtype=weight.dtype)
        for stored, weight in weights.items()
        if names[stored] in outer.common
    }


def worker_files(
    outer: Outer, parameters: Mapping[str, nn.Parameter], state: Mapping[str, Tensor], comm: Comm
) -> list[TensorFile]:
    """The optimizer's state of the first worker, and what else there is of all; `state`: this worker's."""

    def row(tensor: Tensor, index: int, rows: int) -> Held:
        """This worker's tensor as one of several rows; of a negative index, none."""
        part = tensor.detach().unsqueeze(0)
        return Held(part if index >= 0 else part[:0], max(index, 0), (rows, *tensor.shape), True, tensor.dtype)

    tensors = {f"{_MOMENTUM}{name}": held(momentum) for name, momentum in outer.momentum.items()}
    for name, parameter in parameters.items():
        if parameter.dtype != torch.float32:
            tensors[f"{_COMMON}{name}"] = held(outer.common[name])
        if not outer.is_common:
            tensors[f"{_WEIGHT}{name}"] = row(parameter, comm.rank, comm.world)
    tensors |= {f"{_PENDING}{name}": held(mean) for name, mean in outer.pending().items()}
    tensors |= {f"{_STATE}{name}": row(tensor, comm.rank - 1, comm.world - 1) for name, tensor in state.items()}
    firsts = {
        name: Held(tensor if comm.rank == 0 else tensor.new_empty(0), 0, (*tensor.shape,), True, tensor.dtype)
        for name, tensor in state.items()
    }
    return [TensorFile(OPTIMIZER, firsts, {}), TensorFile(WORKERS, tensors, {})]


def stored_moments(checkpoint: Path, strategy: Strategy, comm: Comm) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's state of what trains now, for this worker: of what rests, it is given up."""
    own = _own_moments(strategy, comm, checkpoint)
    for name, tensor in read_tensors(checkpoint / OPTIMIZER) if own is None else own:
        if name.rpartition(".")[0] not in strategy.resting:
            yield name, tensor


def _own_moments(strategy: Strategy, comm: Comm, checkpoint: Path) -> Iterator[tuple[str, Tensor]] | None:
    """The optimizer's state that a worker goes on with, where each has its own; None: the first one's.

    Where there are more workers than there were, they go on with the states of the same ones once more.
    """
    file = checkpoint / WORKERS
    if strategy.outer is None or not file.is_file():
        return None
    with safe_open(file, framework="pt") as stored:
        name = next((name for name in stored.keys() if name.startswith(_STATE)), None)  # noqa: SIM118
        workers = 1 if name is None else stored.get_slice(name).get_shape()[0] + 1
    worker = comm.rank % workers
    return None if worker == 0 else _rows(file, worker - 1)


def _rows(file: Path, index: int) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - safe_open is no mapping
            if name.startswith(_STATE):
                yield name.removeprefix(_STATE), stored.get_slice(name)[index : index + 1][0]


@torch.no_grad()
def take_up_workers(strategy: Strategy, comm: Comm, checkpoint: Path) -> None:
    """Go on from the weights that each worker had of its own, after all else has been taken up with the common ones.

    With another number of workers, or where they share each step now, all go on with the mean of these weights: no
    worker's steps since the latest average are lost.

    Raises:
        UserError: a tensor is not of its parameter's shape.
    """
    outer, file = strategy.outer, checkpoint / WORKERS
    if not file.is_file():
        if outer:
            _log.warning("%s holds no average of workers: its momentum begins at zero", checkpoint)
        return
    pending: dict[str, Tensor] = {}
    places: dict[str, Callable[[str, Tensor], object]] = {_PENDING: pending.__setitem__}
    if outer:
        places[_MOMENTUM] = lambda name, tensor: outer.momentum[name].copy_(tensor)
        places[_COMMON] = lambda name, tensor: outer.common[name].copy_(tensor)
    for prefix, name, tensor in _shared(file, strategy, checkpoint):
        if prefix in places:
            places[prefix](name, tensor)
    counts = {0}
    for name, weights, count in _own_weights(file, strategy, comm):
        copy_share(strategy.parameters[name], weights)
        counts.add(count)
    workers = max(counts)
    if outer:
        outer.take_up(pending, is_common=not workers)
    else:
        _log.warning("%s: given up, but for what the workers' own weights were: they share each step now", file)
    if workers not in (0, comm.world) or (workers and not outer):
        _log.warning("%s: the weights of %d workers go on as their mean on each of %d", file, workers, comm.world)


def _shared(file: Path, strategy: Strategy, checkpoint: Path) -> Iterator[tuple[str, str, Tensor]]:
    """What all workers have in common, of what trains: prefix, name, tensor."""
    for full, tensor in read_tensors(file):
        prefix, name = full[: full.index(".") + 1], full.partition(".")[2]
        if prefix not in (_MOMENTUM, _COMMON, _PENDING) or name not in strategy.parameters:
            continue
        _require_shape(file, full, tensor.shape, strategy.parameters[name].shape)
        yield prefix, name, tensor


def _own_weights(file: Path, strategy: Strategy, comm: Comm) -> Iterator[tuple[str, Tensor, int]]:
    """Those that this worker goes on with, by name, and how many workers' there are."""
    with safe_open(file, framework="pt") as stored:
        for full in stored.keys():  # noqa: SIM118 - safe_open is no mapping
            name = full.removeprefix(_WEIGHT)
            if not full.startswith(_WEIGHT) or name not in strategy.parameters:
                continue
            rows = stored.get_slice(full)
            workers, *shape = rows.get_shape()
            _require_shape(file, full, shape, strategy.parameters[name].shape)
            if strategy.outer and workers == comm.world:
                yield name, rows[comm.rank : comm.rank + 1][0], workers
            else:
                total = sum(rows[worker : worker + 1][0].float() for worker in range(workers))
                yield name, torch.as_tensor(total) / workers, workers


def _require_shape(file: Path, name: str, found: "torch.Size | list[int]", wanted: torch.Size) -> None:
    if [*found] != [*wanted]:
        raise UserError(f"{file}: {name} has the shape {[*found]}, and not {[*wanted]}")

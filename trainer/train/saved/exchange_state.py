"""What a checkpoint holds of the exchange of gradients: each worker's errors, and what all workers have in common."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from trainer.checkpoint.write import EXCHANGE, TensorFile
from trainer.errors import UserError
from trainer.parallel.comm import Comm
from trainer.parallel.local_shard import Held, held
from trainer.parallel.strategy import Exchange, Strategy

_log = logging.getLogger(__name__)
_ERROR, _BASIS = "error.", "basis."  # before the names of parameters


def exchange_files(strategy: Strategy, comm: Comm) -> list[TensorFile]:
    """The file, where anything is kept: errors as [workers, *shape of the parameter], of which each has one row."""
    exchange = strategy.exchange
    if exchange is None or not exchange.keeps_errors:
        return []
    tensors = {
        f"{_ERROR}{name}": Held(error.unsqueeze(0), comm.rank, (comm.world, *error.shape), True, error.dtype)
        for name, error in exchange.errors.items()
    }
    tensors |= {f"{_BASIS}{name}": held(basis) for name, basis in exchange.bases.items()}
    return [TensorFile(EXCHANGE, tensors, {})]


def take_up_exchange(strategy: Strategy, comm: Comm, checkpoint: Path) -> None:
    """Go on with what was kept up to a checkpoint: to the bit with as many workers, else with the mean of all errors,
    which leaves nothing out either. What cannot go on is told.

    Raises:
        UserError: a tensor is not of its parameter's shape.
    """
    exchange, file = strategy.exchange, checkpoint / EXCHANGE
    if exchange is None or not exchange.keeps_errors:
        if file.is_file():
            _log.warning("%s: given up: gradients are exchanged without what was left out of them before", file)
        return
    if not file.is_file():
        _log.warning("%s holds no errors of the exchange: they begin at zero", checkpoint)
        return
    found = _Found(0, 0, 0)
    for name, kept, workers in _stored(file, exchange, comm):
        is_error, parameter = name.startswith(_ERROR), name.partition(".")[2]
        place = (exchange.errors if is_error else exchange.bases).get(parameter)
        if place is None or (not is_error and place.shape != kept.shape):  # of another rank
            found = found._replace(dropped=found.dropped + 1)
            continue
        if place.shape != kept.shape:
            raise UserError(f"{file}: {name} has the shape {[*kept.shape]}, and not {[*place.shape]}")
        place.copy_(kept)
        found = found._replace(taken=found.taken + is_error, workers=workers if is_error else found.workers)
    if found.dropped:
        _log.warning("%s: %d tensors of the exchange are given up, which has no place for them", file, found.dropped)
    if fresh := len(exchange.errors) - found.taken:
        _log.warning("%s: %d tensors of the exchange are not there, and begin at zero", file, fresh)
    if found.workers not in (0, comm.world):
        was = f"the errors of {found.workers} workers go on as their mean on each of {comm.world}"
        _log.warning("%s: %s", file, was)


class _Found(NamedTuple):
    """How many tensors were taken up or not, and how many workers' errors there are."""

    taken: int
    dropped: int
    workers: int


def _stored(file: Path, exchange: Exchange, comm: Comm) -> Iterator[tuple[str, Tensor, int]]:
    """What is there for this worker, one at a time: by name, with the number of workers whose errors there are."""
    with safe_open(file, framework="pt") as stored:
        for name in stored.keys():  # noqa: SIM118 - safe_open is no mapping
            if not name.startswith(_ERROR):
                yield name, stored.get_tensor(name), 0
                continue
            rows = stored.get_slice(name)
            workers = rows.get_shape()[0]
            if workers == comm.world:
                yield name, rows[comm.rank : comm.rank + 1][0], workers
            else:
                mean = torch.stack([rows[worker : worker + 1][0].float() for worker in range(workers)]).mean(dim=0)
                yield name, mean, workers

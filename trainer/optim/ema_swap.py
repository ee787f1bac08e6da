"""Averaged weights in the model for a while, such as a validation, and the live ones back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.optim.ema import Averages, NamedParameters, require_home
from trainer.optim.ema_pieces import batches, copy_all, scratch_buffers, views
from trainer.parallel.sharding import local_tensor


@contextmanager
def averaged_weights(averages: Averages, average: str, parameters: NamedParameters) -> Iterator[None]:
    """Inside, the model's weights are an average; afterwards they are what they were, to the bit.

    fp32 weights change places with their average, which takes no memory. bf16 weights are kept beside, and inside are
    the average's nearest bf16. All workers enter, each changes its rows; weights that are spread must not be gathered
    before (`Strategy.gathered` goes inside).

    Raises:
        ValueError: an average is in the model already.
    """
    require_home(averages)
    shards = averages.shards[average]
    weights = {name: local_tensor(parameter).detach() for name, parameter in parameters.items()}
    kept = {name: weight.clone() for name, weight in weights.items() if weight.dtype != torch.float32}
    swapped = [(weight, shards[name]) for name, weight in weights.items() if name not in kept]
    (scratch,) = scratch_buffers(weights, 1)
    averages.lent = average
    try:
        _exchange(swapped, scratch)
        copy_all([(weights[name], shards[name]) for name in kept])
        yield
    finally:
        _exchange(swapped, scratch)
        copy_all([(weights[name], value) for name, value in kept.items()])
        averages.lent = None


@torch.no_grad()
def _exchange(pairs: Iterable[tuple[Tensor, Tensor]], scratch: Tensor) -> None:
    """Swap the contents of both tensors of each pair, some rows at a time."""
    for one, other in pairs:
        for (piece,) in batches({"": one}, max(scratch.numel(), 1)):
            mine, theirs = piece.of(one), piece.of(other)
            (held,) = views(scratch, [mine])
            copy_all([(held, mine), (mine, theirs), (theirs, held)])

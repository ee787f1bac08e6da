"""Sums over the workers that hold rows of the same parameters, several parameters' in one exchange."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from trainer.optim.adamw import CHUNK_ELEMENTS
from trainer.optim.kinds.rule import Sums
from trainer.parallel.local_shard import local_part, sharers


class _HasParameter(Protocol):
    @property
    def parameter(self) -> nn.Parameter: ...


_Each = TypeVar("_Each", bound=_HasParameter)


def together(todo: Iterable[_Each], chunk_elements: int | None) -> Iterator[list[_Each]]:
    """Parameters whose sums travel together, the same on all workers; one by one where nothing is to be summed."""
    batch: list[_Each] = []
    elements = 0
    for each in todo:
        batch.append(each)
        workers, device = sharers(each.parameter)[1], local_part(each.parameter)[0].device.type
        elements += each.parameter.numel() // workers
        if workers == 1 or elements >= (chunk_elements or CHUNK_ELEMENTS[device]):
            yield batch
            batch, elements = [], 0
    if batch:
        yield batch


def run_together(running: Sequence[Sums], add: Callable[[list[Tensor]], list[Tensor]]) -> None:
    """Run all of them to their ends, with one exchange for what they ask at a time."""
    asking = [(each, asked) for each in running if (asked := next(each, None)) is not None]
    while asking:
        answers = add([asked for _, asked in asking])
        went_on = ((each, _send(each, answer)) for (each, _), answer in zip(asking, answers, strict=True))
        asking = [(each, asked) for each, asked in went_on if asked is not None]


def _send(running: Sums, answer: Tensor) -> Tensor | None:
    """What is asked next; None at the end."""
    try:
        return running.send(answer)
    except StopIteration:
        return None


def added(parameter: Tensor, asked: list[Tensor]) -> list[Tensor]:
    """The sums of tensors over the workers that together hold all rows once, if `parameter` is spread."""
    group, _ = sharers(parameter)
    if group is None or not asked:
        return asked
    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(each.dtype for each in asked):
        places = [place for place, each in enumerate(asked) if each.dtype == dtype]
        flat = torch.cat([asked[place].reshape(-1) for place in places])
        torch.distributed.all_reduce(flat, group=group)
        for place, piece in zip(places, flat.split([asked[place].numel() for place in places]), strict=True):
            found[place] = piece.view(asked[place].shape)
    return [found[place] for place in range(len(asked))]

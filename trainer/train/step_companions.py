"""What an image is given of the other images of its step: another's noise, or another image to be told apart from.

A step's images lie on several workers and in several passes. All workers see all of them, sorted by their draws' seeds,
which are a keyed shuffle of their own: so the cut into workers and passes changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.data.loader import Batch
from trainer.diffusion.noise import NoiseRecipe, draw
from trainer.diffusion.objective import Objective
from trainer.parallel.comm import Comm, broadcast_object, gather_tensors


@dataclass(frozen=True, eq=False)
class Companions:
    """Of the images of a micro-batch.

    Attributes:
        noise_seeds: [B] int64 on the CPU, whose noise each gets; None: its own.
        negatives: [B, 4, h, w], another image of the step for each, unscaled; None where there is none.
        negative_seeds: [B] int64 on the CPU, whose noise those have.
    """

    noise_seeds: Tensor | None = None
    negatives: Tensor | None = None
    negative_seeds: Tensor | None = None


ALONE = Companions()


def each_alone(batches: Iterable[Batch]) -> Iterator[tuple[Batch, Companions]]:
    """The batches as they come, their images without companions."""
    return ((batch, ALONE) for batch in batches)


@dataclass(frozen=True)
class Meeting:
    """How the images of a step meet.

    Attributes:
        pairs: noises are dealt out anew, to the images that are nearest to them on the whole (Tong et al. 2023, arXiv
            2302.00482: the optimal transport of a batch).
        contrasts: each image gets another one, with its noise (Stoica et al. 2025, arXiv 2506.05350).
    """

    comm: Comm
    recipe: NoiseRecipe
    pairs: bool
    contrasts: bool

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Companions]]:
        """A step's micro-batches with the companions of their images; all are read before the first comes.

        Where a step has one image alone, it has no companion.
        """
        own = list(batches)
        latents, seeds, order = self._everyone(own)
        if len(order) < 2:
            yield from each_alone(own)
            return
        noise_of = seeds[order]
        if self.pairs:
            noise_of = noise_of[self._paired(latents[order], noise_of)]
        negative_of = torch.arange(len(order)).roll(1)
        places = torch.zeros(len(latents), dtype=torch.int64)  # of padding: any, for it does not count
        places[order] = torch.arange(len(order))
        begin = self.comm.rank * (len(latents) // self.comm.world)
        for batch in own:
            place = places[begin : begin + len(batch.weights)]
            begin += len(batch.weights)
            negative = negative_of[place]
            yield (
                batch,
                Companions(
                    noise_seeds=noise_of[place] if self.pairs else None,
                    negatives=latents[order[negative]] if self.contrasts else None,
                    negative_seeds=noise_of[negative] if self.contrasts else None,
                ),
            )

    def _everyone(self, own: list[Batch]) -> tuple[Tensor, Tensor, Tensor]:
        """All workers' latents [N, 4, h, w] and seeds [N], and the places of those that count, sorted by seed."""
        latents = torch.cat([_latents(batch) for batch in own]).cpu()
        seeds = torch.cat([batch.draw_seeds for batch in own])
        counts = torch.cat([batch.weights for batch in own]) > 0
        latents, seeds = gather_tensors(self.comm, latents), gather_tensors(self.comm, seeds)
        counts = gather_tensors(self.comm, counts)
        there = counts.nonzero().flatten()
        return latents, seeds, there[seeds[there].argsort(stable=True)]

    def _paired(self, latents: Tensor, seeds: Tensor) -> Tensor:
        """Whose noise each image gets, as worker 0 finds it: another card might round a tie another way."""
        found = optimal_pairing(latents, seeds, self.recipe).tolist() if self.comm.rank == 0 else None
        return torch.tensor(broadcast_object(self.comm, found))


def meeting_of(objective: Objective, comm: Comm) -> Callable[[Iterable[Batch]], Iterator[tuple[Batch, Companions]]]:
    """How the images of a step meet, if the objective asks for it; else they stay alone."""
    pairs, contrasts = objective.pairs, objective.contrast > 0
    return Meeting(comm, objective.noise, pairs, contrasts) if pairs or contrasts else each_alone


def optimal_pairing(latents: Tensor, seeds: Tensor, recipe: NoiseRecipe) -> Tensor:
    """The permutation of the seeds' noises with the least sum of squared distances to the images, [n] int64.

    Args:
        latents: [n, 4, h, w]; a scale and shift that all have in common change nothing.
    """
    from scipy.optimize import linear_sum_assignment

    _, draws = draw(seeds, latents.shape[1:], "cpu", recipe)
    # |x - n|^2 = |x|^2 + |n|^2 - 2 x n, of which the first two have the same sum in every permutation.
    likeness = latents.flatten(1).float() @ draws.noise.flatten(1).T
    return torch.from_numpy(linear_sum_assignment(likeness.double().numpy(), maximize=True)[1])


def _latents(batch: Batch) -> Tensor:
    assert batch.latents is not None, "images are encoded before they come here"
    return batch.latents

"""The loss on held-out images, with noise fixed by each image's key and at fixed timesteps.

Two numbers from two checkpoints are then comparable to the last digit: only the weights differ.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.data.loader import Batch, BatchReader, Request
from trainer.diffusion.noise import Draws, standard_normal
from trainer.diffusion.objective import Objective
from trainer.evaluate.validating.scored_images import ScoredImage, images_of, rows_of_batch
from trainer.evaluate.validating.scored_rows import Row, in_batches
from trainer.keyed import draw_seed
from trainer.model.denoiser import Denoiser, image_losses, text_arguments
from trainer.parallel.comm import Comm, failing_together, gather_objects
from trainer.parallel.strategy import evaluating


@dataclass(frozen=True)
class ValidationLoss:
    """Mean loss per image at each timestep, and over all of them.

    Attributes:
        num_images: rows that could be read; an image counts once for each of its repeats among them.
        images: each of them once, with its own losses.
    """

    loss: float
    at_timestep: dict[int, float]
    num_images: int
    images: tuple[ScoredImage, ...] = ()


def validation_batches(reader: BatchReader, rows: Sequence[Row], batch_size: int, comm: Comm) -> Iterator[Batch]:
    """This worker's share of the rows: batches of one bucket, dealt out in turn.

    The batches are the same however many workers there are, so the losses are too.
    """
    for bucket, ids in in_batches(rows, batch_size)[comm.rank :: comm.world]:
        yield reader.read(Request(0, bucket, np.array(ids, dtype=np.int64), np.ones(len(ids), dtype=np.float32)))


def validation_loss(
    denoiser: Denoiser, batches: Iterable[Batch], timesteps: Sequence[int], comm: Comm
) -> ValidationLoss:
    """Score this worker's batches; the result is of all workers' and, to the bit, the same for any number of them.

    Args:
        denoiser: its model's training mode is put back afterwards.
        batches: as `validation_batches` deals them out.
        timesteps: each image is scored at each of them, with the same noise.

    Raises:
        FailedBeside: (on every worker) one of them could not score its batches.
    """
    scored: list[tuple[list[float], float, list[list[Any]]]] = []  # sums at timesteps, sum of weights, rows
    with failing_together(comm), evaluating(denoiser.model):
        for batch in batches:
            sums, losses = [], []
            for timestep in timesteps:
                of_images = _losses(denoiser, batch, timestep, comm.device)
                # Each batch's sum in float32, as ever: means of older runs stay comparable to the last bit.
                sums.append(float((of_images * batch.weights.to(comm.device)).sum()))
                losses.append(of_images.tolist())
            scored.append((sums, float(batch.weights.sum()), rows_of_batch(batch, losses)))
    shares = gather_objects(comm, scored)
    most = max(map(len, shares))
    in_turn = [share[number] for number in range(most) for share in shares if number < len(share)]
    num_images, totals = 0.0, [0.0] * len(timesteps)
    for sums, weight, _ in in_turn:
        num_images += weight
        # Not `sum`, which newer Pythons round otherwise.
        totals = [total + one for total, one in zip(totals, sums, strict=True)]
    means = {t: total / max(num_images, 1.0) for t, total in zip(timesteps, totals, strict=True)}
    images = images_of([row for _, _, rows in in_turn for row in rows])
    return ValidationLoss(sum(means.values()) / len(means), means, round(num_images), images)


def _losses(denoiser: Denoiser, batch: Batch, timestep: int, device: torch.device) -> Tensor:
    """Of each image, [m] float32 on the device."""
    text = text_arguments(denoiser, device, batch.input_ids, batch.text_hidden, batch.pooled)
    assert batch.latents is not None, "images are encoded before they come here"
    latents = batch.latents.to(device)
    seeds = torch.tensor([draw_seed("validation noise", key) for key in batch.keys], dtype=torch.int64)
    noise = standard_normal(seeds, latents.shape[1:], device)
    # The plain error of what is predicted, where it is trained: numbers of runs that weight it in other ways can be
    # compared, and what a mask leaves out says nothing of the training.
    objective = Objective(denoiser.objective.prediction, mean=denoiser.objective.mean)
    mixture = objective.prediction.at_timestep(torch.full((len(latents),), timestep)).to(device)
    time_ids = batch.time_ids.to(device)
    draws = Draws(noise)
    return image_losses(denoiser, denoiser.model, latents, draws, mixture, text, time_ids, objective, masks=batch.masks)

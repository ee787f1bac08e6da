"""The loss on held-out images, with noise fixed by each image's key and at fixed timesteps.

Two numbers from two checkpoints are then comparable to the last digit: only the weights differ.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trainer.data.loader import Batch, BatchReader, Request
from trainer.data.sampler import pick_rows
from trainer.diffusion.noise import Draws, standard_normal
from trainer.diffusion.objective import Objective
from trainer.keyed import draw_seed
from trainer.model.denoiser import Denoiser, image_losses, text_arguments
from trainer.parallel.comm import Comm, failing_together, sum_floats
from trainer.parallel.strategy import evaluating


@dataclass(frozen=True)
class ValidationLoss:
    """Mean loss per image at each timestep, and over all of them."""

    loss: float
    at_timestep: dict[int, float]
    num_images: int


def validation_batches(reader: BatchReader, max_images: int, batch_size: int, comm: Comm) -> Iterator[Batch]:
    """This worker's share of the held-out images: batches of one bucket, dealt out in turn.

    The batches are the same however many workers there are, so the losses are too.
    """
    rows = pick_rows(reader.prepared.rows_per_bucket(reader.split), max_images)
    batches: list[tuple[int, list[int]]] = []
    for bucket, row in rows:
        if not batches or batches[-1][0] != bucket or len(batches[-1][1]) == batch_size:
            batches.append((bucket, []))
        batches[-1][1].append(row)
    for bucket, ids in batches[comm.rank :: comm.world]:
        yield reader.read(Request(0, bucket, np.array(ids, dtype=np.int64), np.ones(len(ids), dtype=np.float32)))


def validation_loss(
    denoiser: Denoiser, batches: Iterable[Batch], timesteps: Sequence[int], comm: Comm
) -> ValidationLoss:
    """Score this worker's batches; the result is of all workers' and the same on each.

    Args:
        denoiser: its model's training mode is put back afterwards.
        timesteps: each image is scored at each of them, with the same noise.

    Raises:
        FailedBeside: (on every worker) one of them could not score its batches.
    """
    sums = dict.fromkeys(timesteps, 0.0)
    num_images = 0.0
    with failing_together(comm), evaluating(denoiser.model):
        for batch in batches:
            num_images += float(batch.weights.sum())
            for timestep in timesteps:
                sums[timestep] += _loss_sum(denoiser, batch, timestep, comm.device)
    *totals, num_images = sum_floats(comm, [*sums.values(), num_images])
    means = {t: total / max(num_images, 1.0) for t, total in zip(timesteps, totals, strict=True)}
    return ValidationLoss(sum(means.values()) / len(means), means, round(num_images))


def _loss_sum(denoiser: Denoiser, batch: Batch, timestep: int, device: torch.device) -> float:
    text = text_arguments(denoiser, device, batch.input_ids, batch.text_hidden, batch.pooled)
    assert batch.latents is not None, "images are encoded before they come here"
    latents = batch.latents.to(device)
    seeds = torch.tensor([draw_seed("validation noise", key) for key in batch.keys], dtype=torch.int64)
    noise = standard_normal(seeds, latents.shape[1:], device)
    # The plain error of what is predicted: numbers of runs that weight it in other ways can be compared.
    objective = Objective(denoiser.objective.prediction)
    mixture = objective.prediction.at_timestep(torch.full((len(latents),), timestep)).to(device)
    time_ids = batch.time_ids.to(device)
    losses = image_losses(denoiser, denoiser.model, latents, Draws(noise), mixture, text, time_ids, objective)
    return float((losses * batch.weights.to(device)).sum())

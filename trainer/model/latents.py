"""The VAE in the loop: batches of pixels become batches of latents just before they are trained on or scored."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from trainer.data.loader import Batch
from trainer.data.store.rows import RowProblem
from trainer.model.vae import ImageEncoder


def encoded_batches(encoder: ImageEncoder | None, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches with latents in place of pixels; those that hold latents already are passed on as they are.

    An image for which the VAE gives values that are not finite gets weight 0 and an entry in `problems`, under its key.
    """
    for batch in batches:
        yield batch if batch.pixels is None or encoder is None else _encoded(encoder, batch)


def _encoded(encoder: ImageEncoder, batch: Batch) -> Batch:
    assert batch.pixels is not None and batch.vae_seeds is not None
    latents = encoder.encode(batch.pixels, batch.vae_seeds)
    finite = latents.isfinite().flatten(1).all(dim=1)
    if bool(finite.all()):
        return replace(batch, pixels=None, latents=latents)
    usable = finite.cpu()
    reason = "the VAE gives values for it that are not finite (model.vae_precision: fp32 may help)"
    unusable = [
        RowProblem(key, -1, -1, reason)
        for key, good, weight in zip(batch.keys, usable.tolist(), batch.weights.tolist(), strict=True)
        if weight and not good
    ]
    return replace(
        batch,
        pixels=None,
        latents=torch.where(finite[:, None, None, None], latents, 0.0),
        weights=batch.weights * usable,
        problems=(*batch.problems, *unusable),
    )

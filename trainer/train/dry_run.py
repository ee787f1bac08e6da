"""The fullest step, tried out before the first: what does not fit fails within the first minute."""

import logging
import resource
from functools import partial

import torch

from trainer.config.schema import Config
from trainer.data.loader import Batch
from trainer.errors import OutOfMemory
from trainer.memory.choice import in_gib
from trainer.memory.run_choice import MemoryChoice, is_out_of_memory
from trainer.model.latents import encoded_batches
from trainer.model.text import text_positions
from trainer.train.step import StepParts, train_step

_log = logging.getLogger(__name__)


def dry_run(config: Config, parts: StepParts, choice: MemoryChoice) -> None:
    """Run the fullest step, with a learning rate of 0; weights stay, the optimizer's state is cleared.

    Twice, for only the second one has the optimizer's state beside its activations; and on a card once more, when the
    allocator has settled. Call it before a checkpoint's optimizer state is put in place. Does nothing where nothing was
    planned.

    Raises:
        OutOfMemory: it did not fit.
    """
    if choice.needed is None:
        return
    device, (height, width, images) = parts.comm.device, choice.fullest
    passes = min(choice.passes, 2)
    batch = _blank_batch(config, parts, choice.fullest)
    what = f"a step on {images} x {width} x {height} px"
    sweeps, learner = 0, parts.denoiser.objective.learner
    lessons = learner.record() if learner else {}
    try:
        for _ in range(3 if device.type == "cuda" else 2):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                sweeps = _sweeps(device)
            encoded = encoded_batches(parts.denoiser.image_encoder, [batch] * passes)
            train_step(parts, encoded, passes, float(images * passes * parts.comm.world), 0.0, False)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"{what} did not fit; {in_gib(choice.needed)} GiB were planned") from error
    parts.optimizer.state.clear()
    if parts.release and parts.release.hosted:
        parts.release.hosted.clear()
    if learner:  # what it has learnt from a blank image is no lesson
        learner.take_up(lessons)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        numbers = torch.cuda.max_memory_allocated(device), choice.tensors, torch.cuda.max_memory_reserved(device)
        told = "dry run of the fullest step: it fits; tensors took %s GiB, planned %s; PyTorch's allocator took %s"
        _log.info(told, *map(in_gib, numbers))
        if _sweeps(device) > sweeps:
            _log.warning(
                "%s fits only if the allocator empties its cache in every step, which is slow; a smaller"
                " train.batch_size_per_gpu or memory.budget avoids it",
                what,
            )
        torch.cuda.empty_cache()
    else:
        process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        told = "dry run of the fullest step: it fits; %s GiB of tensors were planned, the whole process took %s"
        _log.info(told, in_gib(choice.tensors), in_gib(process))


def _sweeps(device: torch.device) -> int:
    """How often the allocator found no free block and gave back all that it had kept."""
    return torch.cuda.memory_stats(device)["num_alloc_retries"]


def _blank_batch(config: Config, parts: StepParts, fullest: tuple[int, int, int]) -> Batch:
    """A batch of zeros, in the shapes of the run's batches."""
    height, width, images = fullest
    unet = dict(parts.denoiser.unet.config)
    pooled_width = unet["projection_class_embeddings_input_dim"] - 6 * unet["addition_time_embed_dim"]
    chunks, cached = config.captions.max_tokens // 75, config.data.cache_text
    text_shape = text_positions(chunks, config.captions.chunks), unet["cross_attention_dim"]
    holds_images = parts.denoiser.image_encoder is not None
    half, whole = partial(torch.zeros, dtype=torch.float16), partial(torch.zeros, dtype=torch.int64)
    return Batch(
        latents=None if holds_images else half(images, unet["in_channels"], height // 8, width // 8),
        pixels=torch.zeros(images, 3, height, width, dtype=torch.uint8) if holds_images else None,
        vae_seeds=whole(images) if holds_images else None,
        input_ids=None if cached else whole(images, 2, chunks, 77),
        text_hidden=half(images, *text_shape) if cached else None,
        pooled=half(images, pooled_width) if cached else None,
        time_ids=torch.zeros(images, 6),
        weights=torch.ones(images),
        draw_seeds=whole(images),
        keys=("",) * images,
        problems=(),
        masks=torch.full((images, height // 8, width // 8), 255, dtype=torch.uint8)
        if config.objective.loss.masked
        else None,
        loss_weights=torch.ones(images),
    )

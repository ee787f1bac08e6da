"""One optimizer step: gradients of the weighted mean loss, one reduction, clip, AdamW.

The loss of a step is `sum(w_i * l_i) / sum(w_i)` over every image of the step on every worker, where
`l_i` is the mean over the image's latent elements, weighed by its mask where it has one. So it does not depend
on how the step is cut into workers and micro-batches, nor on padding or unreadable rows (weight 0). Images with a loss
weight count `w_i * weight_i` above the line and `w_i` below it.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.data.loader import Batch
from trainer.data.store.rows import RowProblem
from trainer.diffusion.learner import Learner, seen_by
from trainer.diffusion.noise import draw
from trainer.diffusion.prediction import Mixture
from trainer.measure.step_clock import STOPPED, StepClock
from trainer.measure.timestep_losses import sums_by_timestep
from trainer.model.denoiser import Denoiser, Others, image_losses, text_arguments
from trainer.optim.ema import Averages
from trainer.optim.hosted.hosted_weights import HostedWeights
from trainer.optim.optimizers import scale_lr, take_optimizer_step
from trainer.parallel.comm import Comm, sum_floats
from trainer.parallel.sharding import local_tensor
from trainer.parallel.strategy import Strategy
from trainer.train.gradient_blocks import GradientBlocks
from trainer.train.guard.numerics_guard import TAKEN, Judge, Verdict, skip_what_is_not_finite
from trainer.train.release import GradientRelease
from trainer.train.step_companions import ALONE, Companions, each_alone


def all_alike(batch: Batch) -> Tensor:
    """How much each image counts, fp32 [B] on the CPU: 1, and 0 for padding and unreadable rows."""
    return batch.weights


def by_loss_weight(batch: Batch) -> Tensor:
    """The same times the images' loss weights."""
    assert batch.loss_weights is not None, "the reader was given no loss weights"
    return batch.weights * batch.loss_weights


@dataclass(frozen=True)
class StepParts:
    """What stays the same from step to step, chosen once when the run is built.

    Attributes:
        around_forward: what every forward pass runs in.
        before_norm: what is done to the gradients of the loss times a scale, before their norm is taken.
        weigh: `all_alike`, or `by_loss_weight` where images count more or less.
        blocks: of which the gradients' norms are told; None: none.
        meet: gives a step's micro-batches with what their images get of the step's others.
        averages: of the weights, which follow the steps by `trainer.train.saved.averages.follow`; None: there are none.
        release: makes the updates within the backward pass, so that a step is judged before it by its loss alone; None:
            they are made after it.
        clock: marks the phases of a step, if it was started.
        exchange_is_timed: and, of a model that is spread over the workers, its waits within the passes.
        hosted_weights: of blocks, which lie in the host's memory; None: all lie on the device.
    """

    comm: Comm
    strategy: Strategy
    optimizer: torch.optim.Optimizer
    denoiser: Denoiser
    max_grad_norm: float
    around_forward: Callable[[], AbstractContextManager[None]] = nullcontext
    before_norm: Callable[[float], None] = lambda loss_scale: None
    weigh: Callable[[Batch], Tensor] = all_alike
    blocks: GradientBlocks | None = None
    meet: Callable[[Iterable[Batch]], Iterable[tuple[Batch, Companions]]] = each_alone
    averages: Averages | None = None
    release: GradientRelease | None = None
    clock: StepClock = STOPPED
    exchange_is_timed: bool = True
    hosted_weights: HostedWeights | None = None


@dataclass(frozen=True)
class StepResult:
    """Sums over one optimizer step, equal on all workers.

    Attributes:
        loss: mean over the step's images, each times its loss weight, as it was trained; NaN if none was readable.
        num_images: images with weight, over all workers.
        grad_norm: global L2 norm before clipping; of workers that take steps each by itself, the mean of theirs.
        bad_rows: rows that could not be read, over all workers.
        problems: this worker's among them.
        stop: any worker was asked to stop.
        told: sums of `tell`.
        block_norms: of the gradients by block, before clipping, where they are wanted; of workers that take steps each
            by itself, this one's.
        verdict: why the step was skipped, if it was.
        keys: of this worker's images with weight.
        by_timestep: as `trainer.measure.timestep_losses` adds them up.
    """

    loss: float
    num_images: float
    grad_norm: float
    bad_rows: int
    problems: tuple[RowProblem, ...]
    stop: bool
    told: tuple[float, ...] = ()
    block_norms: Mapping[str, float] = field(default_factory=dict)
    verdict: Verdict = TAKEN
    keys: tuple[str, ...] = ()
    by_timestep: tuple[float, ...] = ()

    @property
    def took_effect(self) -> bool:
        """Whether the step changed the weights: it had an image, and was not skipped."""
        return self.num_images > 0 and not self.verdict.reason


class BatchLosses(NamedTuple):
    """Each image's loss, fp32 [B], with the graph that leads back to the weights; and where the images are."""

    losses: Tensor
    mixture: Mixture


def batch_losses(
    parts: StepParts, batch: Batch, index: int, planned_images: float, companions: Companions = ALONE
) -> BatchLosses:
    """The losses of a micro-batch.

    Args:
        index: of the micro-batch among this worker's.
        planned_images: of the whole step.
        companions: of the batch's images.
    """
    device, denoiser, clock = parts.comm.device, parts.denoiser, parts.clock
    clock.mark("encode" if denoiser.frozen_text_encoders else "copy")
    text = text_arguments(denoiser, device, batch.input_ids, batch.text_hidden, batch.pooled)
    clock.mark("copy")
    assert batch.latents is not None, "images are encoded before they come here"
    latents = batch.latents.to(device, non_blocking=True)
    shape, recipe = latents.shape[1:], denoiser.objective.noise
    uniforms, draws = draw(batch.draw_seeds, shape, device, recipe, companions.noise_seeds)
    others = None
    if companions.negatives is not None and companions.negative_seeds is not None:
        _, their_draws = draw(companions.negative_seeds, shape, device, recipe)
        others = Others(companions.negatives.to(device, non_blocking=True), their_draws)
    # As the sampler deals rows out: rank r of W has every W-th from the r-th on, padding comes last.
    places = parts.comm.rank + parts.comm.world * torch.arange(len(uniforms) * index, len(uniforms) * (index + 1))
    mixture = denoiser.objective.mixture(uniforms, places, round(planned_images)).to(device)
    time_ids = batch.time_ids.to(device, non_blocking=True)
    clock.mark("forward")
    with parts.around_forward():
        model = parts.strategy.model
        losses = image_losses(
            denoiser, model, latents, draws, mixture, text, time_ids, others=others, masks=batch.masks
        )
    return BatchLosses(losses, mixture)


def train_step(
    parts: StepParts,
    batches: Iterable[Batch],
    accumulation: int,
    planned_images: float,
    lr_factor: float,
    stop_asked: bool,
    loss_scale: float = 1.0,
    tell: Callable[[], Sequence[float]] = tuple,
    before_update: Callable[[], None] = lambda: None,
    judge: Judge = skip_what_is_not_finite,
) -> StepResult:
    """Run one optimizer step over this worker's micro-batches.

    Args:
        batches: `accumulation` micro-batches, the same number on every worker.
        planned_images: sum of the step's weights over all workers as the sampler planned it; gradients
            are scaled by it, and corrected where rows turned out to be unreadable.
        lr_factor: learning rates of this step as a share of each part's peak.
        loss_scale: what the loss is multiplied by before the backward pass, in fp16.
        stop_asked: this worker received a signal; all workers learn of it in `StepResult.stop`.
        tell: what else the workers add up, as many numbers on each; the sums are `StepResult.told`. Called when the
            device has done the step's passes.
        before_update: called before weights and optimizer change, or anything else that a checkpoint holds.
        judge: whether the step is skipped, of its loss, gradient norm and images, which are the same on all workers.
    """
    comm, strategy, clock = parts.comm, parts.strategy, parts.clock
    seen, early = _Seen(parts.denoiser.objective.learner), TAKEN
    loss_sum = torch.zeros((), dtype=torch.float64, device=comm.device)
    for index, (batch, companions) in enumerate(parts.meet(batches)):
        weights = parts.weigh(batch)
        counts = weights.to(comm.device, non_blocking=True)
        last = index == accumulation - 1
        with strategy.reduction(last=last):
            losses, mixture = batch_losses(parts, batch, index, planned_images, companions)
            weighted = (counts * losses).sum()
            scaled = weighted * (loss_scale / planned_images)
            if parts.release or (last and strategy.keeps_errors):
                _settle_saves(clock, before_update)
            clock.mark("backward")
            early = _backward(parts, batch, weighted, scaled, planned_images, lr_factor, judge)
        loss_sum += weighted.detach()
        seen.note(batch, losses, mixture, weights)
    clock.mark("optimizer")
    # All of this is given to the device before the step's only wait for it, or it would stand idle in between.
    names, (norm, of_blocks) = parts.blocks.names if parts.blocks else (), _norms(parts, loss_scale)
    clock.mark("exchange" if comm.world > 1 else "other")
    read = torch.cat([torch.stack([loss_sum, norm.double()]), of_blocks, *seen.losses]).tolist()
    (own_loss, scaled_norm), block_norms, factored = read[:2], read[2 : 2 + len(names)], read[2 + len(names) :]
    own_loss, lessons, by_timestep = seen.sums(own_loss, factored)
    own, tells = [own_loss, seen.images, float(len(seen.problems)), float(stop_asked), scaled_norm], tell()
    summed = sum_floats(comm, [*own, *tells, *lessons, *by_timestep])
    (total_loss, num_images, total_bad, stop, norms), told, lessons, by_timestep = _cut(summed, own, tells, lessons)
    _settle_saves(clock, before_update)
    clock.mark("optimizer")
    # Workers have the same norm, and this mean of it; each by itself, they clip by their own. By the mean all decide.
    factor = planned_images / num_images / loss_scale if num_images else 0.0  # not as planned with unreadable rows
    grad_norm = norms / comm.world * factor if num_images else 0.0
    loss = total_loss / num_images if num_images else math.nan
    has_been_taken = parts.release is not None and math.isfinite(grad_norm)
    verdict = early if early.reason or has_been_taken else judge(loss, grad_norm, num_images)
    takes_effect = num_images > 0 and not verdict.reason
    if takes_effect:
        if parts.release is None:
            _update(parts, scaled_norm * factor if strategy.outer else grad_norm, factor, lr_factor)
        seen.learn(lessons)
    strategy.end_step(took_effect=takes_effect)
    return StepResult(
        loss=loss,
        num_images=num_images,
        grad_norm=grad_norm,
        bad_rows=int(total_bad),
        problems=tuple(seen.problems),
        stop=stop > 0,
        told=tuple(told),
        block_norms={name: norm / loss_scale for name, norm in zip(names, block_norms, strict=True)},
        verdict=verdict,
        keys=tuple(seen.keys),
        by_timestep=tuple(by_timestep),
    )


def _settle_saves(clock: StepClock, before_update: Callable[[], None]) -> None:
    """Until what a checkpoint copies may change."""
    clock.mark("save")
    before_update()


def _cut(sums: list[float], *parts: Sequence[float]) -> list[list[float]]:
    """The sums of as many numbers as each part has, and of the rest."""
    ends = [0, *accumulate(map(len, parts))]
    return [sums[begin:end] for begin, end in pairwise([*ends, len(sums)])]


def _backward(
    parts: StepParts,
    batch: Batch,
    weighted: Tensor,
    scaled: Tensor,
    planned_images: float,
    lr_factor: float,
    judge: Judge,
) -> Verdict:
    """The backward pass of a micro-batch; where it has all updates in it, only if its loss can be right."""
    if parts.release is None:
        parts.strategy.backward(scaled)
        return TAKEN
    images = float(batch.weights.sum())
    verdict = judge(float(weighted.detach()) / images if images else math.nan, 0.0, images)
    if images and not verdict.reason:
        parts.release.begin(planned_images / images, lr_factor)
        parts.strategy.backward(scaled)
    return verdict


class _Seen:
    """What a step has seen, and its losses, image by image, for the record by timestep and for the objective's learner.

    Attributes:
        images: sum of their weights: padding and unreadable rows have none.
        keys: of those with weight.
    """

    def __init__(self, learner: Learner | None) -> None:
        self._learner = learner
        self.images = 0.0
        self.problems: list[RowProblem] = []
        self.keys: list[str] = []
        self.losses: list[Tensor] = []
        """[B] float64 on the device, of each micro-batch."""
        self._mixtures: list[Mixture] = []
        self._counts: list[Tensor] = []
        self._weights: list[Tensor] = []

    def note(self, batch: Batch, losses: Tensor, mixture: Mixture, weights: Tensor) -> None:
        """A micro-batch; `weights` are what its losses are multiplied by, on the CPU."""
        self.images += float(batch.weights.sum())
        self.problems += batch.problems
        self.keys += [key for key, weight in zip(batch.keys, batch.weights.tolist(), strict=True) if weight]
        self.losses.append(losses.detach().double())
        self._mixtures.append(mixture)
        self._counts.append(batch.weights)
        self._weights.append(weights)

    def sums(self, own_loss: float, factored: list[float]) -> tuple[float, list[float], list[float]]:
        """The loss sum to tell, what the learner adds up, and the sums by timestep; `factored` are the values of
        `losses`."""
        told, lessons = torch.tensor(factored, dtype=torch.float64), []
        if self._learner:
            seen = seen_by(self._mixtures, self._weights, factored, self._learner)
            lessons = self._learner.sums(seen)
            if not self._learner.corrects:
                told, own_loss = seen.losses, float((seen.weights * seen.losses).sum())
        positions = [mixture.positions for mixture in self._mixtures]
        return own_loss, lessons, sums_by_timestep(positions, told, torch.cat(self._weights), torch.cat(self._counts))

    def learn(self, lessons: list[float]) -> None:
        """From the sums over all workers."""
        if self._learner:
            self._learner.learn(lessons)


def _norms(parts: StepParts, loss_scale: float) -> tuple[Tensor, Tensor]:
    """Of all gradients and by block, as `Strategy.grad_norm` gives them."""
    if parts.release:
        return parts.release.finish(parts.comm.device, parts.blocks)
    parts.before_norm(loss_scale)
    num_blocks = len(parts.blocks.names) if parts.blocks else 0
    return parts.strategy.grad_norm(_gradients(parts), _blocks(parts), num_blocks)


def _blocks(parts: StepParts) -> Tensor | None:
    """The number of each gradient's block."""
    present = (parameter.grad is not None for parameter in parts.strategy.parameters.values())
    return parts.blocks.of(present) if parts.blocks else None


def _update(parts: StepParts, grad_norm: float, factor: float, lr_factor: float) -> None:
    """Correct the gradients by a factor, clip them by their norm, and apply them."""
    if 0 < parts.max_grad_norm < grad_norm:
        factor *= parts.max_grad_norm / (grad_norm + 1e-6)
    scale_lr(parts.optimizer, lr_factor)
    take_optimizer_step(parts.optimizer, factor)


def _gradients(parts: StepParts) -> list[Tensor]:
    """This worker's; not to be kept, because the optimizer may free each after its use."""
    parameters = parts.strategy.parameters.values()
    return [local_tensor(parameter.grad) for parameter in parameters if parameter.grad is not None]

"""The objective of a run: pure functions of tensors, chosen once; nothing is looked up by name in a step.

uniforms, draws = draw(seeds, shape, device, objective.noise)    the samples' own random numbers
mixture = objective.mixture(uniforms, places, count)             where in the process they are
noise, input_noise = mixed_noise(draws, latents, objective.noise)
loss = objective.losses(prediction, mixed_target(mixture, latents, noise), mixture)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trainer.diffusion.learner import Learner
from trainer.diffusion.losses import Delta, Loss, squared
from trainer.diffusion.noise import PLAIN, NoiseRecipe
from trainer.diffusion.prediction import Mixture, Prediction
from trainer.diffusion.timesteps import EVENLY, Distribution, Spread, independent
from trainer.diffusion.weighting import Weighting, unweighted


@dataclass(frozen=True, eq=False)
class Objective:
    """What is trained.

    Attributes:
        prediction: how image and noise are mixed, and what the network is asked for.
        distribution: how often each position in the process is trained.
        spread: how the samples of a step share it.
        weigh: how much each sample counts by its noise level.
        loss: of each element, with `delta` for Huber's alone.
        noise: what is added to plain noise.
        learner: what the losses teach; its factors are part of `weigh`. None: nothing is learnt from them.
        pairs: the noises of a step are dealt out to the images that they are nearest to.
        contrast: how much of the loss against another image's target is taken off.
    """

    prediction: Prediction
    distribution: Distribution = EVENLY
    spread: Spread = independent
    weigh: Weighting = unweighted
    loss: Loss = squared
    delta: Delta | None = None
    noise: NoiseRecipe = PLAIN
    learner: Learner | None = None
    pairs: bool = False
    contrast: float = 0.0

    def mixture(self, uniforms: Tensor, places: Tensor, count: int) -> Mixture:
        """Of samples, by their uniform numbers [B] float64 and their places in a step of so many; on the CPU."""
        return self.prediction.mix(self.distribution(self.spread(uniforms, places, count)))

    def losses(self, prediction: Tensor, target: Tensor, mixture: Mixture, negative: Tensor | None = None) -> Tensor:
        """Each sample's weighted loss, the mean over its elements: [B, c, h, w] each -> [B] float32.

        Args:
            negative: the target of another sample, for `contrast`.
        """
        delta = _columns(_on(self.delta(mixture), prediction.device)) if self.delta else None
        elements = self.loss(prediction, target, delta)
        if negative is not None:
            elements = elements - self.contrast * self.loss(prediction, negative, delta)
        losses = elements.flatten(1).mean(dim=1)
        return losses if self.weigh is unweighted else losses * _on(self.weigh(mixture).float(), prediction.device)


def taught(objective: Objective, learner: Learner) -> Objective:
    """The objective with what a learner makes of the losses, from step to step."""

    def weigh(mixture: Mixture) -> Tensor:
        return objective.weigh(mixture) * learner.factors(mixture)

    return replace(objective, weigh=weigh, learner=learner)


def mixed_input(mixture: Mixture, latents: Tensor, noise: Tensor) -> Tensor:
    """What the network sees, [B, c, h, w] float32; all on one device."""
    return _columns(mixture.input_signal) * latents + _columns(mixture.input_noise) * noise


def mixed_target(mixture: Mixture, latents: Tensor, noise: Tensor) -> Tensor:
    """What it is asked for, [B, c, h, w] float32."""
    return _columns(mixture.target_signal) * latents + _columns(mixture.target_noise) * noise


def _columns(numbers: Tensor) -> Tensor:
    return numbers.view(-1, 1, 1, 1)


def _on(numbers: Tensor, device: torch.device) -> Tensor:
    """A few numbers on the device; a card's caller does not wait for it."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)

"""What the UNet is asked to predict, and the loss of its answer: pure functions of tensors, chosen once per run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trainer.diffusion.schedule import NoiseSchedule


@dataclass(frozen=True, eq=False)
class Objective:
    """A noise schedule and the three functions of a training step. Latents are scaled by the VAE's factor.

    The model's input is `noisy_latents(schedule, latents, noise, timesteps)`, its answer is compared with
    `target(schedule, latents, noise, timesteps)` by `loss(prediction, target)`, which gives one number per
    sample. `latents` and `noise` are [B, c, h, w], `timesteps` [B] int64, the loss [B] float32.
    """

    schedule: NoiseSchedule
    noisy_latents: Callable[[NoiseSchedule, Tensor, Tensor, Tensor], Tensor]
    target: Callable[[NoiseSchedule, Tensor, Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]


def epsilon_objective(schedule: NoiseSchedule) -> Objective:
    """Predict the noise, mean squared error: the objective of SDXL's base model (DDPM, eq. 14).

    `schedule` must lie on the device of the latents.
    """
    return Objective(schedule, add_noise, epsilon_target, mean_squared_error)


def add_noise(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """sqrt(alpha_bar_t) * latents + sqrt(1 - alpha_bar_t) * noise (DDPM, eq. 4), in the dtype of `latents`."""
    alpha_bar = schedule.alphas_cumprod.to(latents.dtype)[timesteps].view(-1, 1, 1, 1)
    return alpha_bar.sqrt() * latents + (1.0 - alpha_bar).sqrt() * noise


def epsilon_target(schedule: NoiseSchedule, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """The noise itself."""
    return noise


def mean_squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean over a sample's elements of the squared error, computed in float32: [B, ...] twice -> [B] float32."""
    return (prediction.float() - target.float()).square().flatten(1).mean(dim=1)

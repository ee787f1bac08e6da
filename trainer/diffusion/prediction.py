"""What the network is asked for: how image and noise are mixed into its input, and what of them is its target.

A sample's place in the process is its position: a number in [0, 1), 0 being the image and 1 the noise. Of a schedule of
1,000 timesteps, position p is timestep floor(1000 p).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from trainer.diffusion.schedule import NoiseSchedule, scaled_linear, zero_terminal_snr

PredictionType = Literal["epsilon", "v_prediction", "flow", "edm"]
_STEPS = 1000
SIGMA_DATA = 0.5  # of EDM: standard deviation of the scaled latents, as its models were trained
_TINY = 1e-12
_LEAST = 1e-6  # of noise, or of signal, that a mixture of flow matching has


@dataclass(frozen=True, eq=False)
class Mixture:
    """Each sample's input and target as sums of its image x0 and its noise n; all [B], the numbers float32.

        input = input_signal * x0 + input_noise * n
        target = target_signal * x0 + target_noise * n

    Attributes:
        timesteps: what the network is told, int64 (of a schedule) or float32.
        positions: float64 in [0, 1).
        signal, noise: shares before any scaling of the input, so that SNR = (signal / noise)^2; float64.
        error: an error of x0 over the error of the target that causes it, float64 (v-prediction: x0 = a x - s v, so s).
    """

    timesteps: Tensor
    input_signal: Tensor
    input_noise: Tensor
    target_signal: Tensor
    target_noise: Tensor
    positions: Tensor
    signal: Tensor
    noise: Tensor
    error: Tensor

    @property
    def log_snr(self) -> Tensor:
        """ln(SNR), [B] float64."""
        return 2 * (self.signal.clamp(min=_TINY).log() - self.noise.clamp(min=_TINY).log())

    def to(self, device: torch.device | str) -> Mixture:
        """What the network needs on the device; the rest stays on the CPU. A card's caller does not wait for it."""
        if torch.device(device).type == "cpu":
            return self
        names = ("input_signal", "input_noise", "target_signal", "target_noise")
        numbers = torch.stack([getattr(self, name) for name in names]).pin_memory().to(device, non_blocking=True)
        timesteps = self.timesteps.pin_memory().to(device, non_blocking=True)
        return replace(self, timesteps=timesteps, **dict(zip(names, numbers, strict=True)))


@dataclass(frozen=True, eq=False)
class Prediction:
    """A process and a target.

    Attributes:
        kind: as the configuration names it.
        zero_terminal_snr: whether the schedule ends in noise alone.
        mix: from positions [B] float64 on the CPU to the mixture there.
        shift: of flow matching, 1 for none.
    """

    kind: PredictionType
    mix: Callable[[Tensor], Mixture]
    zero_terminal_snr: bool = False
    shift: float = 1.0

    @property
    def schedule(self) -> NoiseSchedule:
        """Of epsilon and v-prediction."""
        return zero_terminal_snr(scaled_linear()) if self.zero_terminal_snr else scaled_linear()

    def log_snr(self, positions: Tensor) -> Tensor:
        """ln(SNR) at positions, float64; falls with the position."""
        return self.mix(positions).log_snr

    def at_timestep(self, timesteps: Tensor) -> Mixture:
        """Where a schedule of 1,000 steps has these timesteps, [B] int64."""
        return self.mix((timesteps.double() + 0.5) / _STEPS)


def epsilon() -> Prediction:
    """The noise itself (DDPM, Ho et al. 2020, eq. 14), on SDXL's own schedule."""
    return Prediction("epsilon", _of_schedule(scaled_linear(), predicts_v=False))


def v_prediction(*, with_zero_terminal_snr: bool = False) -> Prediction:
    """v = alpha n - sigma x0 (Salimans and Ho 2022, arXiv 2202.00512, section 4)."""
    schedule = zero_terminal_snr(scaled_linear()) if with_zero_terminal_snr else scaled_linear()
    return Prediction("v_prediction", _of_schedule(schedule, predicts_v=True), with_zero_terminal_snr)


def flow(shift: float = 1.0) -> Prediction:
    """The velocity n - x0 along x = s n + (1 - s) x0 (rectified flow, Liu et al. 2022; Esser et al. 2024, eq. 13).

    The network is told 1000 s, the scale of timesteps that it knows.

    Args:
        shift: r of s' = r s / (1 + (r - 1) s) (Esser et al. 2024, eq. 23, with r the ratio there): more noise for
            larger images.
    """

    def mix(positions: Tensor) -> Mixture:
        s = shifted(positions.double(), shift).clamp(_LEAST, 1 - _LEAST)
        return _mixture(positions, s * _STEPS, 1 - s, s, 1 - s, s, -torch.ones_like(s), torch.ones_like(s), s)

    return Prediction("flow", mix, shift=shift)


def shifted(s: Tensor, shift: float) -> Tensor:
    """s' = r s / (1 + (r - 1) s)."""
    return shift * s / (1 + (shift - 1) * s)


def edm(sigma_data: float = SIGMA_DATA, mean: float = -1.2, std: float = 1.2) -> Prediction:
    """EDM's preconditioned network F (Karras et al. 2022, table 1, rightmost column, and eq. 7).

    The input is c_in (x0 + sigma n), the target (x0 - c_skip (x0 + sigma n)) / c_out, and the network is told
    c_noise = ln(sigma) / 4. Positions are quantiles of ln(sigma) ~ N(mean, std^2), so that uniform ones are EDM's own.
    """

    def mix(positions: Tensor) -> Mixture:
        quantile = torch.special.ndtri(positions.double().clamp(1e-9, 1 - 1e-9))
        sigma = (mean + std * quantile).exp()
        total = sigma**2 + sigma_data**2
        c_skip, c_out, c_in = sigma_data**2 / total, sigma * sigma_data / total.sqrt(), total.rsqrt()
        told = sigma.log() / 4
        return _mixture(
            positions,
            told,
            torch.ones_like(sigma),
            sigma,
            c_in,
            c_in * sigma,
            (1 - c_skip) / c_out,
            -c_skip * sigma / c_out,
            c_out,
        )

    return Prediction("edm", mix)


def _of_schedule(schedule: NoiseSchedule, *, predicts_v: bool) -> Callable[[Tensor], Mixture]:
    # In float32, as the schedulers that sample compute them.
    signals, noises = schedule.alphas_cumprod.sqrt(), (1.0 - schedule.alphas_cumprod).sqrt()

    def mix(positions: Tensor) -> Mixture:
        timesteps = (positions.double() * schedule.num_timesteps).long().clamp(0, schedule.num_timesteps - 1)
        a, s = signals[timesteps], noises[timesteps]
        if predicts_v:
            return _mixture(positions, timesteps, a, s, a, s, -s, a, s)
        return _mixture(positions, timesteps, a, s, a, s, torch.zeros_like(a), torch.ones_like(a), s / a)

    return mix


def _mixture(
    positions: Tensor,
    timesteps: Tensor,
    signal: Tensor,
    noise: Tensor,
    input_signal: Tensor,
    input_noise: Tensor,
    target_signal: Tensor,
    target_noise: Tensor,
    error: Tensor,
) -> Mixture:
    """With the dtypes that it has."""
    told = timesteps if timesteps.dtype == torch.int64 else timesteps.float()
    inputs = input_signal.float(), input_noise.float(), target_signal.float(), target_noise.float()
    return Mixture(told, *inputs, positions.double(), signal.double(), noise.double(), error.double())

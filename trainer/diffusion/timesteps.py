"""Where in the process a sample is trained: distributions over positions, each a function of one uniform number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Distribution = Callable[[Tensor], Tensor]
"""From uniform numbers [B] float64 in [0, 1) to positions [B] float64 in [0, 1), rising."""
Spread = Callable[[Tensor, Tensor, int], Tensor]
"""From uniform numbers, places in the step and its size to uniform numbers."""
_BINS = 20_000


def uniform(low: float = 0.0, high: float = 1.0) -> Distribution:
    """Evenly over [low, high)."""

    def positions(uniforms: Tensor) -> Tensor:
        return uniforms if (low, high) == (0.0, 1.0) else low + (high - low) * uniforms

    return positions


EVENLY = uniform()


def logit_normal(mean: float, std: float, low: float = 0.0, high: float = 1.0) -> Distribution:
    """logit(p) ~ N(mean, std^2) (Esser et al. 2024, eq. 19): the middle more often; a positive mean, more noise.

    Args:
        low, high: only positions in between; the rest of the density is left out.
    """
    edges = _edges()
    cumulative = torch.special.ndtr((torch.logit(edges) - mean) / std)
    return _by_cumulative(cumulative, low, high)


def beta(a: float, b: float, low: float = 0.0, high: float = 1.0) -> Distribution:
    """p ~ Beta(a, b)."""
    centres = (_edges()[1:] + _edges()[:-1]) / 2
    density = (a - 1) * centres.log() + (b - 1) * (1 - centres).log()
    cumulative = torch.cat([torch.zeros(1, dtype=torch.float64), (density - density.max()).exp().cumsum(0)])
    return _by_cumulative(cumulative, low, high)


def laplace(
    log_snr: Callable[[Tensor], Tensor], mean: float, scale: float, low: float = 0.0, high: float = 1.0
) -> Distribution:
    """ln(SNR) ~ Laplace(mean, scale) (Hang et al. 2024, arXiv 2407.03297, table 1): around one noise level.

    Args:
        log_snr: of positions, falling.
    """
    distance = (log_snr(_edges().clamp(1e-9, 1 - 1e-9)) - mean) / scale
    # The share of the density above each log SNR, which falls with the position.
    half = 0.5 * (-distance.abs()).exp()
    return _by_cumulative(torch.where(distance > 0, half, 1 - half), low, high)


def by_weights(weights: Tensor) -> Distribution:
    """Positions in bins of equal width, each as often as its weight says, and evenly within.

    Args:
        weights: [bins] float64, not negative.
    """
    return _by_cumulative(torch.cat([torch.zeros(1, dtype=torch.float64), weights.double().cumsum(0)]))


def aligned_with_flow(log_snr: Callable[[Tensor], Tensor], distribution: Distribution, shift: float) -> Distribution:
    """Positions of a schedule with the noise levels at which flow matching trains (Diff2Flow, arXiv 2506.02221).

    Flow's state at time s is the schedule's at the position with noise / (signal + noise) = s, scaled; with the loss
    weighted by `weighting.like_flow`, training a model of epsilon or v there is training the velocity that follows
    from its answer.

    Args:
        log_snr: of the schedule's positions, falling.
        distribution, shift: of flow's times.
    """
    edges = _edges()
    times = torch.sigmoid(-log_snr(edges.clamp(0, 1 - 1e-9)) / 2)  # noise / (signal + noise), rising in steps

    def positions(uniforms: Tensor) -> Tensor:
        s = distribution(uniforms)
        return _interpolated(shift * s / (1 + (shift - 1) * s), times, edges).clamp(0, 1 - 1e-9)

    return positions


def independent(uniforms: Tensor, places: Tensor, count: int) -> Tensor:
    """Each sample's own uniform number."""
    return uniforms


def stratified(uniforms: Tensor, places: Tensor, count: int) -> Tensor:
    """Uniform numbers of which each has its own `count`-th of [0, 1): (place + u) / count.

    Args:
        uniforms: [B] float64, of a sample each.
        places: [B] int64, the samples' places in the whole step, over all workers; padding stands behind the samples.
        count: samples in the step.
    """
    return (places % count + uniforms) / count


def _edges() -> Tensor:
    return torch.linspace(0, 1, _BINS + 1, dtype=torch.float64)


def _by_cumulative(cumulative: Tensor, low: float = 0.0, high: float = 1.0) -> Distribution:
    """By the inverse of the cumulative distribution, given at evenly spaced positions (any scale and offset)."""
    edges = torch.linspace(0, 1, len(cumulative), dtype=torch.float64)
    first, last = (_interpolated(torch.tensor([p], dtype=torch.float64), edges, cumulative) for p in (low, high))

    def positions(uniforms: Tensor) -> Tensor:
        wanted = first + (last - first) * uniforms.double()
        return _interpolated(wanted, cumulative, edges).clamp(low, max(low, high - 1e-12))

    return positions


def _interpolated(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Piecewise linear through (xs, ys), xs rising."""
    right = torch.searchsorted(xs, x, right=True).clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    return y0 + (y1 - y0) * ((x - x0) / (x1 - x0).clamp(min=1e-300)).clamp(0, 1)

"""Means over images, and how far off they may be: 95 % confidence intervals.

The interval is Student's (Biometrika 6, 1908): mean ± t s / sqrt(n), t the 97.5 % quantile of Student's t with n - 1
degrees of freedom, s / sqrt(n) the standard error over images. For many images t is the normal distribution's 1.96; of
ten it is 2.26, of two 12.7, where the normal one would promise too much.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

LEVEL = 0.95
"""Of all intervals: so many of them hold the mean of all images that might have been held out."""


@dataclass(frozen=True)
class Estimate:
    """A mean, or the difference of two.

    Attributes:
        mean: NaN of no images.
        images: distinct ones that it is of.
        standard_error: None of fewer than two, which tell nothing of it.
        degrees: of freedom of its t distribution.
    """

    mean: float
    images: int
    standard_error: float | None
    degrees: float

    @property
    def half_width(self) -> float | None:
        """The interval is mean ± this; None where it is not known."""
        if self.standard_error is None:
            return None
        return float(stdtrit(self.degrees, 0.5 + LEVEL / 2)) * self.standard_error


def mean_of(values: Sequence[float], copies: Sequence[float]) -> Estimate:
    """The mean over images, of which some may stand for several.

    With weights w = copies / sum(copies), the squared standard error is n / (n - 1) sum(w^2 (x - mean)^2), a ratio's by
    linearization (Cochran, Sampling Techniques, 1977, chapter 6); for equal weights that is s^2 / n. Sums are rounded
    once, so that the order does not matter (`math.fsum`).

    Args:
        values: of each image.
        copies: how often each counts, above 0.
    """
    count, total = len(values), _sum(copies)
    if not count:
        return Estimate(math.nan, 0, None, 0.0)
    mean = _sum(x * m for x, m in zip(values, copies, strict=True)) / total
    if count < 2:
        return Estimate(mean, count, None, 0.0)
    spread = _sum((m / total) ** 2 * (x - mean) ** 2 for x, m in zip(values, copies, strict=True))
    return Estimate(mean, count, math.sqrt(count / (count - 1) * spread), count - 1.0)


def difference(one: Estimate, other: Estimate) -> Estimate:
    """one - other of different images: Welch's interval (Biometrika 34, 1947), which wants no equal variances."""
    mean, images = one.mean - other.mean, one.images + other.images
    if one.standard_error is None or other.standard_error is None:
        return Estimate(mean, images, None, 0.0)
    squares = one.standard_error**2, other.standard_error**2
    total = sum(squares)
    below = squares[0] ** 2 / one.degrees + squares[1] ** 2 / other.degrees
    degrees = total**2 / below if below > 0 else min(one.degrees, other.degrees)
    return Estimate(mean, images, math.sqrt(total), degrees)


def _sum(values: Iterable[float]) -> float:
    """Rounded once; NaN where infinities of both signs meet."""
    try:
        return math.fsum(values)
    except (ValueError, OverflowError):
        return math.nan

"""Scores of drawn images by features alone: CLIP score, CMMD, KID; in float64.

Fréchet's distance (FID) is not here: it is defined by features of an Inception network that comes with libraries for
torchvision, and wants thousands of images to settle, as Jayasumana et al. show.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.evaluate.validating.intervals import Estimate, mean_of

_SIGMA = 10.0  # of CMMD's kernel, and its scale: Jayasumana et al. 2024, section 4
_SCALE = 1000.0


@dataclass(frozen=True)
class QualityScores:
    """Of drawn images beside as many of the data with the same captions.

    Attributes:
        clip_score: how well images fit their captions; more is better.
        clip_score_of_data: the same of the images of the data, as a yardstick.
        cmmd, kid: how far drawn images as a whole are from those of the data; less is better.
        images: of each.
    """

    clip_score: Estimate
    clip_score_of_data: Estimate
    cmmd: float
    kid: float
    images: int


def quality_scores(drawn: NDArray, data: NDArray, texts: NDArray) -> QualityScores:
    """All of them, by CLIP's features [n, d] of drawn images, of the data's and of the captions; n at least 2."""
    scores, of_data = clip_scores(drawn, texts).tolist(), clip_scores(data, texts).tolist()
    even = [1.0] * len(scores)
    return QualityScores(mean_of(scores, even), mean_of(of_data, even), cmmd(drawn, data), kid(drawn, data), len(drawn))


def clip_scores(images: NDArray, texts: NDArray) -> NDArray[np.float64]:
    """Of each image and its text, 100 max(cos, 0), [n].

    Hessel et al. 2021 (arXiv 2104.08718, section 3) with the factor 100 in place of 2.5, as torchmetrics has it.
    """
    return 100 * np.maximum((_normed(images) * _normed(texts)).sum(axis=1), 0.0)


def cmmd(one: NDArray, other: NDArray) -> float:
    """Squared maximum mean discrepancy of normed CLIP features under a Gaussian kernel of sigma 10, times 1000.

    Jayasumana et al. 2024 (arXiv 2401.09603, section 4), in the form that its published code has: means over all
    pairs, each point with itself among them (Gretton et al. 2012, eq. 5). So it is never negative, and of few images
    greater than of many: compare equal numbers.

    Args:
        one, other: [n, d] and [m, d].
    """
    x, y = _normed(one), _normed(other)
    # Less 1, which cancels and of which sums of values so near to it would lose digits.
    means = [np.expm1(-_square_distances(a, b) / (2 * _SIGMA**2)).mean() for a, b in ((x, x), (y, y), (x, y))]
    return float(_SCALE * (means[0] + means[1] - 2 * means[2]))


def kid(one: NDArray, other: NDArray) -> float:
    """Squared maximum mean discrepancy under the kernel (x y / d + 1)^3, without bias, over CLIP features as they are.

    Binkowski et al. 2018 (arXiv 1801.01401, section 4 and eq. 4) take an Inception network's features: the two have
    different values. May be negative of images that are alike.

    Args:
        one, other: [n, d] and [m, d], n and m at least 2.
    """
    x, y = one.astype(np.float64), other.astype(np.float64)

    def kernel(a: NDArray, b: NDArray) -> NDArray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    def among(a: NDArray) -> float:
        values = kernel(a, a)
        return (values.sum() - np.trace(values)) / (len(a) * (len(a) - 1))

    return float(among(x) + among(y) - 2 * kernel(x, y).mean())


def _normed(features: NDArray) -> NDArray[np.float64]:
    wide = features.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def _square_distances(a: NDArray, b: NDArray) -> NDArray:
    """Of normed rows, [n, m]."""
    return np.maximum(2.0 - 2.0 * (a @ b.T), 0.0)

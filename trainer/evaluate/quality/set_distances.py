"""How far two sets of images are apart, by features of each image alone: Fréchet's distance, KID, CMMD; in float64."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from trainer.evaluate.validating.intervals import Estimate

_SIGMA = 10.0  # of CMMD's kernel, and its scale: Jayasumana et al. 2024, section 4
_SCALE = 1000.0
_ROWS = 1024  # of a kernel's matrix at a time: 0.4 GB for 50,000 images
_Kernel = Callable[[NDArray, NDArray], NDArray]


def frechet_distance(one: NDArray, other: NDArray) -> float:
    """Squared Fréchet distance of the normal distributions that have the means and covariances of two sets of features.

    |m - m'|² + Tr(C + C' - 2 (C C')^½), FID where the features are Inception's (Heusel et al. 2017, arXiv 1706.08500,
    eq. 6). With centred features X / sqrt(n - 1) as rows, C = XᵀX, and the eigenvalues of C C' are the squared singular
    values of X X'ᵀ: the sum of these is the trace of the root, also where there are fewer images than features and C is
    singular. Never below 0 but by rounding, and of few images too great (Chong and Forsyth 2020, arXiv 1911.07023).

    Args:
        one, other: [n, d] and [m, d], n and m at least 2.
    """
    x, y = one.astype(np.float64), other.astype(np.float64)
    shift = x.mean(axis=0) - y.mean(axis=0)
    x, y = _root_of_covariance(x), _root_of_covariance(y)
    return float(shift @ shift + (x * x).sum() + (y * y).sum() - 2 * np.linalg.svd(x @ y.T, compute_uv=False).sum())


def _root_of_covariance(features: NDArray) -> NDArray:
    """R with RᵀR = C, of at most d rows."""
    centred = (features - features.mean(axis=0)) / math.sqrt(len(features) - 1)
    if len(centred) <= centred.shape[1]:
        return centred
    return np.asarray(np.linalg.qr(centred, mode="r"))


def kid(one: NDArray, other: NDArray) -> Estimate:
    """Squared maximum mean discrepancy under the kernel (x y / d + 1)³, without bias, and its jackknife interval.

    KID where the features are Inception's (Binkowski et al. 2018, arXiv 1801.01401, section 4). Row i of both belongs
    to one caption, and a pair's two images are alike; so the pairs, not the images, are independent draws, and the
    estimate is the U-statistic over them: the mean of k(x, x') + k(y, y') - k(x, y') - k(x', y) over all two different
    pairs (Gretton et al. 2012, JMLR 13, lemma 6), in which no image meets its own pair's other. Published code takes
    the mean over random subsets of 1,000, which wanders about the same value. May be negative of sets that are alike.

    The standard error is that of leaving out each pair in turn (Efron and Stein 1981); where the two distributions are
    the same it is too great rather than too small.

    Args:
        one, other: [n, d], n at least 2.
    """
    x, y = one.astype(np.float64), other.astype(np.float64)

    def kernel(a: NDArray, b: NDArray) -> NDArray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    count = len(x)
    rows = _row_sums(kernel, x, x) + _row_sums(kernel, y, y) - _row_sums(kernel, x, y) - _row_sums(kernel, y, x)
    total = math.fsum(rows)
    mean = total / (count * (count - 1))
    if count < 3:
        return Estimate(mean, count, None, 0.0)
    without = (total - 2 * rows) / ((count - 1) * (count - 2))
    spread = math.fsum((without - without.mean()) ** 2)
    return Estimate(mean, count, math.sqrt((count - 1) / count * spread), count - 1.0)


def _row_sums(kernel: _Kernel, a: NDArray, b: NDArray) -> NDArray[np.float64]:
    """Of each row of `a`, the kernel with all rows of `b` but that of its own number, [n]."""
    sums = np.empty(len(a))
    for begin in range(0, len(a), _ROWS):
        values = kernel(a[begin : begin + _ROWS], b)
        own = np.arange(len(values))
        values[own, own + begin] = 0.0
        sums[begin : begin + len(values)] = values.sum(axis=1)
    return sums


def cmmd(one: NDArray, other: NDArray) -> float:
    """Squared maximum mean discrepancy of normed CLIP features under a Gaussian kernel of sigma 10, times 1000.

    Jayasumana et al. 2024 (arXiv 2401.09603, section 4), in the form that its published code has: means over all
    pairs, each point with itself among them (Gretton et al. 2012, eq. 5). So it is never negative, and of few images
    greater than of many: compare equal numbers.

    Args:
        one, other: [n, d] and [m, d].
    """
    x, y = normed(one), normed(other)
    means = [_mean_less_one(a, b) for a, b in ((x, x), (y, y), (x, y))]
    return float(_SCALE * (means[0] + means[1] - 2 * means[2]))


def _mean_less_one(a: NDArray, b: NDArray) -> float:
    """The mean of the Gaussian kernel of normed rows, less 1, which cancels and of which sums of values so near to it
    would lose digits."""
    total = 0.0
    for begin in range(0, len(a), _ROWS):
        square_distances = np.maximum(2.0 - 2.0 * (a[begin : begin + _ROWS] @ b.T), 0.0)
        total += np.expm1(-square_distances / (2 * _SIGMA**2)).sum()
    return total / (len(a) * len(b))


def normed(features: NDArray) -> NDArray[np.float64]:
    """Each row divided by its length."""
    wide = features.astype(np.float64)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)

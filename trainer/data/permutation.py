"""Keyed shuffles of range(size) in our own integer arithmetic, so that an order survives every library upgrade.

Large ranges use a Feistel network: any position is computed alone, nothing is stored. Small ranges, on which
a Feistel network is measurably uneven, are sorted by a counter hash instead.
"""

import math

import numpy as np
from numpy.typing import NDArray

SORT_BELOW = 65_536
_ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK_64 = (1 << 64) - 1


def permuted(positions: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Values of a bijection of range(size) at the given positions.

    Args:
        positions: [n] int64, each in range(size).
        size: how many values there are.
        key: 63-bit integer that picks the bijection.

    Returns:
        [n] int64.
    """
    if size < SORT_BELOW:
        return shuffled_range(size, key)[positions].astype(np.int64)
    values = _feistel(positions.astype(np.uint64), size, key)
    outside = np.flatnonzero(values >= size)
    while outside.size:  # cycle walking: the network's domain is a little larger than the range
        values[outside] = _feistel(values[outside], size, key)
        outside = outside[values[outside] >= size]
    return values.view(np.int64)


def shuffled_range(size: int, key: int) -> NDArray[np.uint16]:
    """All of range(size) in the order that `key` picks; size below SORT_BELOW. [size] uint16."""
    if size >= SORT_BELOW:
        raise ValueError(f"size ({size}) must be below {SORT_BELOW}")
    # Stream of SplitMix64 (Steele, Lea, Flood 2014) seeded by the key: 64-bit values that never repeat, so
    # sorting by them is a uniform shuffle and no sorting algorithm can change the result.
    stream = _mixed(np.arange(1, size + 1, dtype=np.uint64) * _GOLDEN + _mixed_key(key, 0))
    return np.argsort(stream, kind="stable").astype(np.uint16)


def _feistel(values: NDArray[np.uint64], size: int, key: int) -> NDArray[np.uint64]:
    """One pass of a generalized Feistel network on Z_a x Z_b (Black and Rogaway 2002, section 5).

    The domain a*b exceeds `size` by less than sqrt(size), so that values outside the range are rare.
    """
    a = math.isqrt(size - 1) + 1
    b = -(-size // a)
    left = values // np.uint64(b)
    right = values - left * np.uint64(b)
    for pair in range(_ROUNDS // 2):
        left = _added(left, right, a, _mixed_key(key, 2 * pair + 1))
        right = _added(right, left, b, _mixed_key(key, 2 * pair + 2))
    return left * np.uint64(b) + right


def _added(
    half: NDArray[np.uint64], other: NDArray[np.uint64], modulus: int, round_key: np.uint64
) -> NDArray[np.uint64]:
    hashed = _mixed(other * _GOLDEN + round_key)
    hashed >>= np.uint64(32)
    hashed *= np.uint64(modulus)
    hashed >>= np.uint64(32)  # the hash's upper half scaled to the modulus: a division would cost more
    hashed += half
    hashed -= np.uint64(modulus) * (hashed >= modulus)
    return hashed


def _mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer, in place."""
    values ^= values >> np.uint64(30)
    values *= _MIX_1
    values ^= values >> np.uint64(27)
    values *= _MIX_2
    values ^= values >> np.uint64(31)
    return values


def _mixed_key(key: int, index: int) -> np.uint64:
    # In Python's integers: numpy warns when a scalar (not an array) wraps around.
    counter = (key + (index + 1) * int(_GOLDEN)) & _MASK_64
    return _mixed(np.array([counter], dtype=np.uint64))[0]

"""Which pictures look alike, by their fingerprints."""

from collections.abc import Sequence

import numpy as np

MOST_BITS = 6
"""Fingerprints of 64 bits that differ in no more are taken for those of one picture."""
_AT_ONCE = 512


def near_duplicates(fingerprints: Sequence[int | None], most_bits: int = MOST_BITS) -> list[list[int]]:
    """Groups of at least two places whose fingerprints are linked by steps of at most `most_bits`, largest first.

    Args:
        fingerprints: of 64 bits; None belongs to no group.
    """
    places = [i for i, fingerprint in enumerate(fingerprints) if fingerprint is not None]
    bits = np.array([fingerprints[i] for i in places], dtype=np.uint64)
    leader = list(range(len(places)))

    def find(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]
            i = leader[i]
        return i

    for begin in range(0, len(bits), _AT_ONCE):
        differing = np.bitwise_count(bits[begin : begin + _AT_ONCE, None] ^ bits[None, :])
        for i, j in np.argwhere(differing <= most_bits).tolist():
            if begin + i < j:
                leader[find(j)] = find(begin + i)
    groups: dict[int, list[int]] = {}
    for i, place in enumerate(places):
        groups.setdefault(find(i), []).append(place)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group[0]))

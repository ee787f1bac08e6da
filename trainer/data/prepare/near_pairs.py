"""Which of many 64-bit hashes differ in a few bits at most, exactly and without comparing all with all.

Multi-index hashing (Norouzi, Punjani and Fleet, Fast Search in Hamming Space with Multi-Index Hashing, 2012): the bits
are cut into m blocks. Of two hashes that differ in at most d bits, one block differs in few: if each of the first
d mod m + 1 blocks differed in more than d // m bits, and each other block in more than d // m - 1, there were more than
d in all. So hashes are sorted by each block in turn, and compared with those whose block differs in so few bits.
How many blocks there are is chosen by the number of hashes.

Where more pairs are found than are held at once, as among thousands of nearly white images, the first half is settled
before the second, which those that stay have made smaller by then: such a crowd costs its number times that of the few
which stay of it, not its square.
"""

from collections.abc import Iterator
from itertools import chain, combinations
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_BITS = 64
_MOST_BLOCK_BITS = 22  # a table of so many places is 16 MB
_ROW_NS, _PAIR_NS = 10.0, 7.0  # to look up a row, and to compare a pair; measured on one core
_ROWS_AT_ONCE = 1 << 15
_PAIRS_AT_ONCE = 1 << 19
_MOST_PAIRS = 1 << 20  # that are held to be gone through one after another


class Block(NamedTuple):
    """Some neighbouring bits of a hash, and in how many of them at most two hashes may differ to be compared."""

    shift: int
    bits: int
    radius: int

    @property
    def flips(self) -> Iterator[int]:
        """What may differ: all numbers of at most `radius` bits out of `bits`; their number is `masks`."""
        places = (combinations(range(self.bits), n) for n in range(self.radius + 1))
        return (sum(1 << place for place in chosen) for chosen in chain.from_iterable(places))

    @property
    def masks(self) -> int:
        """The number of `flips`."""
        return sum(comb(self.bits, n) for n in range(self.radius + 1))


def first_of_near(hashes: NDArray[np.uint64], distance: int, most_pairs: int = _MOST_PAIRS) -> NDArray[np.int32]:
    """For each hash the place of the one that stays for it; its own, if it stays itself.

    Hashes are gone through in their order: each goes if it differs in at most `distance` bits from one that stays, of
    several from the first.

    Args:
        hashes: [n], each another one, n < 2^31.
        most_pairs: how many are held at once; the result does not depend on it.
    """
    stays = np.arange(len(hashes), dtype=np.int32)
    if distance:
        _settle(hashes, stays, stays.copy(), distance, most_pairs)
    return stays


def _settle(
    hashes: NDArray[np.uint64], stays: NDArray[np.int32], places: NDArray[np.int32], distance: int, most_pairs: int
) -> NDArray[np.int32]:
    """Fill in `stays` at `places`, none of which is near to one that stays before them; returns those that stay."""
    pairs, count = [np.empty((0, 2), dtype=np.int32)], 0
    for found in near_pairs(hashes if len(places) == len(hashes) else hashes[places], distance):
        pairs.append(found)
        count += len(found)
        if count > most_pairs and len(places) > 2:
            break
    else:
        _go_through(stays, places, np.concatenate(pairs))
        return places[stays[places] == places]
    del pairs
    first, second = np.array_split(places, 2)
    staying = _settle(hashes, stays, first, distance, most_pairs)
    for found in near_pairs(hashes[second], distance, hashes[staying]):
        np.minimum.at(stays, second[found[:, 0]], staying[found[:, 1]])
    second = second[stays[second] == second]
    return np.concatenate([staying, _settle(hashes, stays, second, distance, most_pairs)])


def _go_through(stays: NDArray[np.int32], places: NDArray[np.int32], pairs: NDArray[np.int32]) -> None:
    """Settle the places by all pairs of them, by the later one."""
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    gone = bytearray(len(places))
    for begin in range(0, len(pairs), _ROWS_AT_ONCE):
        for earlier, later in pairs[begin : begin + _ROWS_AT_ONCE].tolist():
            if not gone[later] and not gone[earlier]:
                gone[later] = 1
                stays[places[later]] = places[earlier]


class _Sorted(NamedTuple):
    """Hashes by one block of theirs."""

    hashes: NDArray[np.uint64]
    keys: NDArray[np.int32]
    """[n], the block's bits, ascending."""
    order: NDArray[np.int32]
    """[n], the place of each before."""


def near_pairs(
    hashes: NDArray[np.uint64], distance: int, others: NDArray[np.uint64] | None = None
) -> Iterator[NDArray[np.int32]]:
    """All pairs of places, [n, 2], whose hashes differ in at most `distance` bits, each once: of two of `hashes`, the
    smaller first, or of one of `hashes` and one of `others`. They come a batch at a time.

    Args:
        hashes: [n], each another one, n < 2^31.
        others: the same.
    """
    blocks = choose_blocks(max(len(hashes), 0 if others is None else len(others)), distance)
    for number, block in enumerate(blocks):
        left = _sort(hashes, block)
        right = left if others is None else _sort(others, block)
        starts = np.searchsorted(right.keys, np.arange((1 << block.bits) + 1, dtype=np.int32)).astype(np.int32)
        for flip in block.flips:
            for rows, columns in _close(left, right, starts, flip, distance):
                # A pair that an earlier block has found as well is not told again.
                differing = left.hashes[rows] ^ right.hashes[columns]
                is_new = np.ones(len(rows), dtype=np.bool_)
                for other in blocks[:number]:
                    is_new &= np.bitwise_count(differing & _mask(other)) > other.radius
                pairs = np.stack([left.order[rows[is_new]], right.order[columns[is_new]]], axis=1)
                if len(pairs):
                    yield np.sort(pairs, axis=1) if others is None else pairs
        del left, right, starts  # before the next are made


def choose_blocks(count: int, distance: int) -> list[Block]:
    """The blocks that take the least time for `count` hashes."""

    def nanoseconds(blocks: list[Block]) -> float:
        return sum(block.masks * (count * _ROW_NS + count**2 / 2 ** (block.bits + 1) * _PAIR_NS) for block in blocks)

    return min((_blocks(number, distance) for number in range(-(-_BITS // _MOST_BLOCK_BITS), 9)), key=nanoseconds)


def _blocks(number: int, distance: int) -> list[Block]:
    """As many blocks; those that nothing has to be looked for in are left out."""
    ends = [_BITS * i // number for i in range(number + 1)]
    radius, more = divmod(distance, number)
    blocks = [Block(ends[i], ends[i + 1] - ends[i], radius if i <= more else radius - 1) for i in range(number)]
    return [block for block in blocks if block.radius >= 0]


def _mask(block: Block) -> np.uint64:
    return np.uint64(((1 << block.bits) - 1) << block.shift)


def _sort(hashes: NDArray[np.uint64], block: Block) -> _Sorted:
    keys = np.empty(len(hashes), dtype=np.int32)
    for begin in range(0, len(hashes), _ROWS_AT_ONCE):
        part = slice(begin, begin + _ROWS_AT_ONCE)
        keys[part] = (hashes[part] >> np.uint64(block.shift)) & np.uint64((1 << block.bits) - 1)
    order = np.argsort(keys).astype(np.int32)
    keys.sort()
    return _Sorted(hashes[order], keys, order)


def _close(
    left: _Sorted, right: _Sorted, starts: NDArray[np.int32], flip: int, distance: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows of both whose keys differ by exactly `flip`, and whose hashes differ in at most `distance` bits; where both
    are the same, each pair once.

    Args:
        starts: [keys + 1], where the rows of each key begin in `right`.
    """
    is_one, top = left is right, 1 << flip.bit_length() >> 1
    for begin in range(0, len(left.keys), _ROWS_AT_ONCE):
        keys = left.keys[begin : begin + _ROWS_AT_ONCE]
        rows = np.arange(begin, begin + len(keys))
        if is_one and flip:
            is_lower = keys & top == 0
            rows, keys = rows[is_lower], keys[is_lower]
        lows = rows + 1 if is_one and not flip else starts[keys ^ flip]
        counts = starts[(keys ^ flip) + 1] - lows
        ends = np.cumsum(counts, dtype=np.int64)
        at = done = 0
        while at < len(rows) and done < ends[-1]:
            stop = max(at + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, "right")))
            some, offsets = counts[at:stop], (lows - ends + counts)[at:stop]
            columns = np.arange(done, ends[stop - 1]) + np.repeat(offsets, some)
            differing = np.repeat(left.hashes[rows[at:stop]], some) ^ right.hashes[columns]
            hits = np.flatnonzero(np.bitwise_count(differing) <= distance)
            if len(hits):
                yield rows[np.searchsorted(ends, done + hits, "right")], columns[hits]
            at, done = stop, int(ends[stop - 1])

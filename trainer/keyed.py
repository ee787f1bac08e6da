"""Seeds derived from what a thing is, so that nothing random depends on when or where it is drawn."""

import hashlib
import struct

_SEED_BITS = 63


def draw_seed(*parts: int | str) -> int:
    """The 63-bit seed of the thing that `parts` name, equal on every machine and in every version.

    Parts are tagged with their type and length, so that ("a", "bc") and ("ab", "c"), or 1 and "1", differ.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, str):
            tag, data = b"s", part.encode()
        else:
            tag, data = b"i", b"%d" % part
        digest.update(b"%b%d:%b" % (tag, len(data), data))
    return int.from_bytes(digest.digest(), "little") >> (64 - _SEED_BITS)


def draw_uniform(*parts: int | str) -> float:
    """A number in [0, 1) that is a function of `parts` alone."""
    return draw_seed(*parts) / 2.0**_SEED_BITS


def draw_words(seed: int, purpose: bytes, count: int) -> tuple[int, ...]:
    """`count` numbers below 2^32 from a draw seed, independent of those for any other purpose; 3 us for a hundred."""
    data = hashlib.shake_128(seed.to_bytes(8, "little") + purpose).digest(4 * count)
    return struct.unpack(f"<{count}I", data)

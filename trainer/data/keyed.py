"""Seeds derived from what a thing is, so that nothing random depends on when or where it is drawn."""

import hashlib

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

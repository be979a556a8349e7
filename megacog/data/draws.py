"""Random numbers that are a function of a key: no state, hence nothing to save or to lose on resume."""

from __future__ import annotations

import struct
from hashlib import blake2b

_UNPACK = struct.Struct("<8Q").unpack


def draw(seed: int, purpose: str, *key: int) -> tuple[int, ...]:
    """Returns 8 independent uniform 64-bit numbers.

    Args:
        seed: of the run.
        purpose: draws for different purposes are independent.
        key: what the numbers belong to, e.g. (epoch, sample).
    """
    text = f"{seed}|{purpose}|{'|'.join(map(str, key))}"
    return _UNPACK(blake2b(text.encode(), digest_size=64).digest())


def unit(number: int) -> float:
    """Returns a 64-bit number as a float in [0, 1)."""
    return (number >> 11) * 2.0**-53


def below(number: int, count: int) -> int:
    """Returns a 64-bit number as an integer in 0..count-1, uniform up to 2**-64 * count."""
    return (number * count) >> 64

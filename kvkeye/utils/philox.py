"""Philox4x32-10: counter-based random numbers, so that a draw depends on its request and position alone.

Key = request seed; counter = (position low, position high, kind of draw, sample index).
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

from __future__ import annotations

_MASK = 0xFFFFFFFF
_MULTIPLY = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

#: Kinds of draw.
SAMPLE = 0
_ACCEPT = 1


def accept_draw(sibling: int) -> int:
    """The kind of draw that decides on draft number `sibling` of a position."""
    return _ACCEPT + (sibling << 8)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Ten rounds; all values are unsigned 32-bit."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = _MULTIPLY[0] * c0, _MULTIPLY[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int, kind: int, sample_index: int) -> float:
    """A float64 in [0, 1) with 53 random bits."""
    counter = (position & _MASK, position >> 32 & _MASK, kind & _MASK, sample_index & _MASK)
    first, second, _, _ = philox4x32(counter, (seed & _MASK, seed >> 32 & _MASK))
    return float(((first << 32 | second) >> 11) * 2.0**-53)

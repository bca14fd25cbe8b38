"""Frames of a clip kept for a second look, in memory that goes back to the system as they are read."""

from __future__ import annotations

import math
import mmap
from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from kvkeye.media.frame import Frame

SLAB_BYTES = 8 << 20


class HeldFrames:
    """A queue of frames of one size, read once.

    They lie in maps of several frames each. Kept as arrays of their own, they and the small objects allocated between
    them would leave the heap with holes into which no later frame fits, up to the same memory again.
    """

    def __init__(self, height: int, width: int) -> None:
        self._shape = height, width, 3
        self._per_slab = max(SLAB_BYTES // (height * width * 3), 1)
        self._slabs: deque[npt.NDArray[np.uint8]] = deque()  # [per_slab, H, W, 3]
        self._count = 0

    def append(self, frame: Frame) -> None:
        """Copies uint8 [H, W, 3]."""
        place = self._count % self._per_slab
        if place == 0:
            self._slabs.append(_new_slab((self._per_slab, *self._shape)))
        self._slabs[-1][place] = frame
        self._count += 1

    def drain(self) -> Iterator[Frame]:
        """Yields the frames in order; each is valid until the next one is asked for."""
        while self._slabs:
            slab = self._slabs.popleft()
            count = min(self._count, self._per_slab)
            self._count -= count
            yield from slab[:count]


def _new_slab(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Zeros that are given back when the array goes; in large pages where the system has them."""
    size = math.prod(shape)
    if not hasattr(mmap, "MAP_PRIVATE"):
        return np.frombuffer(mmap.mmap(-1, size), np.uint8).reshape(shape)
    slab = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        slab.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(slab, np.uint8).reshape(shape)

"""Calls of the packing kernels whose results must not depend on the instruction set. A script: one process, one choice.

    KVKEYE_CPU_ISA=avx2 python -m tests.native.pack_calls

Prints a digest of all results. Every picture ends where its memory ends and begins where it begins: the pages around it
cannot be read, so that a load that leaves the picture ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Iterator

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from kvkeye import ops

CLIP = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
HALF = [0.5] * 3, [0.5] * 3
# (height, width, rows, columns), multiples of 14 out: up, down, one axis, one pixel, wider and taller than 30 times out
SIZES = [
    (1, 1, 14, 28), (2, 3, 28, 14), (14, 14, 14, 14), (28, 300, 28, 294), (300, 28, 294, 28), (37, 91, 56, 280),
    (91, 37, 42, 14), (129, 513, 126, 504), (500, 700, 70, 84), (20, 2000, 14, 28), (2000, 20, 28, 14), (64, 5, 14, 14),
    (3, 260, 14, 252), (100, 230, 98, 238),
]  # fmt: skip


class Guarded:
    """Memory of whole pages between two that cannot be touched."""

    def __init__(self, size: int) -> None:
        self.pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(-1, self.pages + 2 * mmap.PAGESIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        protect = ctypes.CDLL(None, use_errno=True).mprotect
        for guard in (self.address, self.address + mmap.PAGESIZE + self.pages):
            if protect(ctypes.c_void_p(guard), mmap.PAGESIZE, 0) != 0:
                raise OSError(ctypes.get_errno(), "mprotect")

    def hold(self, picture: np.ndarray, at_end: bool) -> Tensor:
        start = mmap.PAGESIZE + (self.pages - picture.size if at_end else 0)
        held = np.frombuffer(self.memory, np.uint8, picture.size, start).reshape(picture.shape)
        held[:] = picture
        return torch.from_numpy(held)


def pictures() -> Iterator[tuple[np.ndarray, int, int]]:
    rng = np.random.default_rng(0)
    for k, (height, width, rows, columns) in enumerate(SIZES):
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        yield np.where(picture > 127, 255, 0).astype(np.uint8) if k % 3 == 0 else picture, rows, columns


def results() -> Iterator[Tensor]:
    for picture, rows, columns in pictures():
        guarded = Guarded(picture.size)
        for at_end in (False, True):
            image = guarded.hold(picture, at_end)
            for bilinear in (False, True):
                yield ops.resize_image(image, rows, columns, bilinear)
                yield ops.resize_image(image, rows - 3, columns - 5, bilinear)
                for dtype in (torch.float32, torch.bfloat16):
                    for mean, std in (HALF, CLIP):
                        yield ops.pack_patches([image], [rows, columns], mean, std, bilinear, 14, dtype)
                yield ops.pack_patches([image, image], [40, 60, 20, 20], *HALF, bilinear, 20, torch.bfloat16)


def digest() -> str:
    found = blake3()
    with ops.use_backends("cpp"):
        for result in results():
            found.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


if __name__ == "__main__":
    print(digest())
    sys.stdout.flush()

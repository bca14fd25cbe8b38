"""uint8 frames to the rows of `pixel_values`, and the key under which their features may be cached."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import torch
from blake3 import blake3

from kvkeye.media.frame import Frame


def patchify(groups: Sequence[Frame], patch_size: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalised patches of frame stacks, packed.

    Args     groups  uint8 [t, height, width, 3] each, sides multiples of patch_size
    Returns  [N, 3 * patch_size^2] fp32, one row per patch: values in (channel, row, column) order,
             rows in raster order (frame, patch row, patch column), groups one after the other
    """
    counts = [g.shape[0] * (g.shape[1] // patch_size) * (g.shape[2] // patch_size) for g in groups]
    out = torch.empty(sum(counts), 3 * patch_size**2)
    start = 0
    for group, count in zip(groups, counts):
        t, height, width, _ = group.shape
        x = torch.from_numpy(np.require(group, requirements=["C", "W"]))
        x = x.view(t, height // patch_size, patch_size, width // patch_size, patch_size, 3)
        x = x.permute(0, 1, 3, 5, 2, 4)  # [t, gh, gw, 3, patch, patch]
        out[start : start + count].view(x.shape).copy_(x)
        start += count
    shift, scale = torch.tensor(mean)[:, None], torch.tensor(std)[:, None]
    out.view(-1, 3, patch_size**2).div_(255).sub_(shift).div_(scale)
    return out


class MediaKey:
    """blake3 over typed, length-framed fields: different field lists never give the same byte stream."""

    def __init__(self) -> None:
        self._hash = blake3()

    def add(self, value: object) -> MediaKey:
        """Adds None, bool, int, float, str, bytes, a uint8 frame stack, or a sequence of those."""
        if value is None:
            return self._frame(b"n", b"")
        if isinstance(value, bool):
            return self._frame(b"b", bytes([value]))
        if isinstance(value, int):
            return self._frame(b"i", str(value).encode())
        if isinstance(value, float):
            return self._frame(b"f", struct.pack("<d", value))
        if isinstance(value, str):
            return self._frame(b"s", value.encode())
        if isinstance(value, bytes):
            return self._frame(b"y", value)
        if isinstance(value, (list, tuple)):
            self._frame(b"l", struct.pack("<Q", len(value)))
            for item in value:
                self.add(item)
            return self
        return self._add_array(value)

    def _add_array(self, value: object) -> MediaKey:
        view = memoryview(value)  # type: ignore[arg-type]
        if view.format != "B":
            raise TypeError(f"MediaKey: elements of format {view.format!r}; only uint8 arrays are hashed.")
        self._frame(b"a", struct.pack(f"<{view.ndim}Q", *(view.shape or ())))
        return self._frame(b"y", view.cast("B") if view.c_contiguous else view.tobytes())

    def _frame(self, kind: bytes, payload: bytes | memoryview) -> MediaKey:
        self._hash.update(kind + struct.pack("<Q", len(payload)))
        self._hash.update(payload)
        return self

    def digest(self) -> bytes:
        return bytes(self._hash.digest())

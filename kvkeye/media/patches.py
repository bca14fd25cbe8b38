"""uint8 frames to the rows of `pixel_values`, and the key under which their features may be cached."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from blake3 import blake3

from kvkeye import ops
from kvkeye.media.frame import Frame
from kvkeye.media.resize import as_picture


def patchify(
    groups: Sequence[Frame],
    patch_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    sizes: Sequence[tuple[int, int]] | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Normalised patches of frame stacks, packed; frames that are not at their size yet are resized, bicubic.

    Args     groups  uint8 [t, height, width, 3] each
             sizes   (height, width) of each group's result, multiples of patch_size; by default the group's own
             dtype   fp32 or bf16
    Returns  [N, 3 * patch_size^2], one row per patch: values in (channel, row, column) order,
             rows in raster order (frame, patch row, patch column), groups one after the other
    """
    sizes = [group.shape[1:3] for group in groups] if sizes is None else sizes
    frames = [as_picture(frame) for group in groups for frame in group]
    sides = [side for group, size in zip(groups, sizes) for _ in group for side in size]
    packed: torch.Tensor = ops.pack_patches(frames, sides, list(mean), list(std), False, patch_size, dtype)
    return packed


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

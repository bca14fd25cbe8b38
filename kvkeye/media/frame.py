"""A decoded picture, a clip as numbered frames, and the checks on their sides. Knows no decoder and no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvkeye.errors import MediaError
from kvkeye.media.limits import MediaLimits

Frame: TypeAlias = npt.NDArray[np.uint8]  # [height, width, 3], RGB
MAX_ASPECT = 200.0


class ShorterThanCounted(Exception):
    """Frames did not come out as the packets promised. Plan again with `num_frames`; they are counted now."""

    def __init__(self, num_frames: int) -> None:
        super().__init__(num_frames)
        self.num_frames = num_frames


class Clip(Protocol):
    """Numbered frames. Sides in pixels after rotation; `fps` is None for a list whose clock is unknown."""

    num_frames: int
    height: int
    width: int

    @property
    def fps(self) -> float | None: ...

    def frames(self, indices: Sequence[int]) -> Iterator[Frame]:
        """Yields uint8 [H, W, 3] for non-decreasing indices; each is valid until the next one is asked for.

        May be called again. Raises `MediaError`, `ShorterThanCounted`.
        """
        ...


def check_aspect(height: float, width: float, limit: float = MAX_ASPECT, where: str = "image") -> None:
    """Raises `MediaError` where one side is more than `limit` times the other, or a side is empty."""
    if min(height, width) < 1:
        raise MediaError(f"{where}: {width}x{height} pixels; both sides must be at least 1.")
    if max(height, width) > limit * min(height, width):
        aspect = max(height, width) / min(height, width)
        raise MediaError(
            f"{where}: {width}x{height} pixels is an aspect ratio of {aspect:.1f}; at most {limit:g} is "
            "accepted. Crop it or cut it in parts."
        )


def check_dimensions(height: int, width: int, limits: MediaLimits, where: str) -> None:
    """Raises `MediaError` where a picture or a clip's frame is over the limits on sides, pixels or aspect."""
    if max(height, width) > limits.max_side or height * width > limits.max_image_pixels:
        raise MediaError(
            f"{where}: {width}x{height} pixels; at most {limits.max_side} per side and {limits.max_image_pixels} in "
            "all are accepted. Scale it down first."
        )
    check_aspect(height, width, limits.max_aspect, where)

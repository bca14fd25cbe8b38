"""Version 1.5's slow and fast frames: which is which, and how large each kind may be.

A frame that differs enough from the last slow frame is slow (type 0) and gets the larger size; the others are fast
(type 1). The rule and its constants are those of the published client utilities, version 1.5.2.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from kvkeye.media.frame import Frame
from kvkeye.media.resize import FACTOR, client_size, resize_frame
from kvkeye.media.sampling import TOKEN, VideoPolicy

SLOW, FAST = 0, 1
_HUE_STEPS = 180  # hue in steps of two degrees
_BITS = 12  # fixed-point digits of the reciprocal tables


def _reciprocals(numerator: float) -> npt.NDArray[np.int32]:
    table = np.zeros(256, np.int32)
    table[1:] = np.rint((1 << _BITS) * numerator / np.arange(1, 256))
    return table


_SATURATION = _reciprocals(255.0)
_HUE = _reciprocals(_HUE_STEPS / 6.0)


def to_hsv(frame: Frame) -> Frame:
    """RGB to HSV in OpenCV's 8-bit convention (hue 0..179, its fixed-point rounding). uint8 [H, W, 3] both."""
    rgb = frame.astype(np.int32)
    red, green, blue = rgb[..., 0], rgb[..., 1], rgb[..., 2]
    value = rgb.max(-1)
    spread = value - rgb.min(-1)
    half = 1 << (_BITS - 1)
    saturation = (spread * _SATURATION[value] + half) >> _BITS
    sector = np.where(
        value == red,
        green - blue,
        np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread),
    )
    hue = (sector * _HUE[spread] + half) >> _BITS
    hue += np.where(hue < 0, _HUE_STEPS, 0)
    return np.stack([hue, saturation, value], axis=-1).astype(np.uint8)


class FrameTyper:
    """Types frames one by one; keeps only the patches of the last slow frame."""

    def __init__(self, height: int, width: int, policy: VideoPolicy, min_frame_similarity: float | None) -> None:
        self.size = client_size(height, width, policy.min_pixels, policy.typing_max_pixels)
        self.threshold = policy.min_frame_similarity if min_frame_similarity is None else min_frame_similarity
        self.patch_threshold = policy.min_patch_similarity
        self.last_slow: tuple[torch.Tensor, torch.Tensor] | None = None

    def type(self, frame: Frame) -> int:
        """SLOW or FAST for the next frame, uint8 [H, W, 3]."""
        patches = self._patches(frame)
        if self.last_slow is not None and not self._differs(self.last_slow, patches):
            return FAST
        self.last_slow = patches
        return SLOW

    def _patches(self, frame: Frame) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors of the 28x28 patches [n, 3 * 784] and their lengths [n]."""
        hsv = torch.from_numpy(to_hsv(resize_frame(frame, self.size, "bilinear"))).float()
        rows, columns = self.size[0] // FACTOR, self.size[1] // FACTOR
        hsv = hsv.view(rows, FACTOR, columns, FACTOR, 3).permute(0, 2, 4, 1, 3).reshape(rows * columns, -1)
        norms = hsv.norm(dim=1) + 1e-8
        return hsv / norms[:, None], norms

    def _differs(self, a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
        lit = ~((a[1] < 0.01) & (b[1] < 0.01))  # two black patches say nothing
        similar = ((a[0] * b[0]).sum(1) > self.patch_threshold)[lit]
        return bool(similar.float().mean() < self.threshold)  # no lit patch: NaN, hence not different


def slow_fast_sizes(
    height: int,
    width: int,
    num_slow: int,
    num_fast: int,
    policy: VideoPolicy,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    total_pixels: int | None = None,
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Sizes (height, width) of slow and of fast frames under the clip's pixel budget.

    The search stops at the first number of tokens per slow frame that is over the budget, as published; the floors
    of the size rule bring the total back under it.
    """
    least = max(min_pixels or policy.min_pixels, policy.min_pixels)
    total = total_pixels or policy.total_pixels
    least_tokens = int(least / TOKEN)
    low: float = least / TOKEN
    high: float = (max_pixels or policy.max_pixels) / TOKEN
    while low < high:
        middle = int(low + high) // 2
        tokens = num_slow * middle + num_fast * max(int(policy.fast_ratio * middle), least_tokens)
        if tokens * TOKEN > total:
            high = middle
        else:
            low = middle + 1
    slow = client_size(height, width, least, low * TOKEN)
    slow_tokens = slow[0] * slow[1] // TOKEN
    fast_pixels = max(int(slow_tokens * policy.fast_ratio) * TOKEN, policy.min_pixels)
    return slow, client_size(height, width, least, fast_pixels)

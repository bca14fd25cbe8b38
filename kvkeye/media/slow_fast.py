"""Version 1.5's slow and fast frames: which is which, and how large each kind may be.

A frame that differs enough from the last slow frame is slow (type 0) and gets the larger size; the others are fast
(type 1). The rule and its constants are those of the published client utilities, version 1.5.2.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from kvkeye.media.frame import Frame
from kvkeye.media.resize import FACTOR, client_size, resize_frame
from kvkeye.media.sampling import TOKEN, VideoPolicy

SLOW, FAST = 0, 1
_HUE_STEPS = 180  # hue in steps of two degrees
_BITS = 12  # fixed-point digits of the reciprocals


@lru_cache(maxsize=1)
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    """OpenCV's fixed-point rounding for every case, uint8.

    hue         [3, 512, 256]: brightest channel, difference of the other two + 256, spread; flat
    saturation  [256, 256]: spread, value; flat
    """
    half = 1 << (_BITS - 1)
    whole = np.arange(256)
    divisors = np.maximum(whole, 1)
    by_value = np.rint((1 << _BITS) * 255.0 / divisors).astype(np.int64) * (whole > 0)
    by_spread = np.rint((1 << _BITS) * (_HUE_STEPS / 6.0) / divisors).astype(np.int64) * (whole > 0)
    saturation = (whole[:, None] * by_value + half) >> _BITS
    sectors = np.arange(-256, 256)[:, None] + 2 * np.arange(3)[:, None, None] * whole
    hue = (sectors * by_spread + half) >> _BITS
    hue += np.where(hue < 0, _HUE_STEPS, 0)
    # Entries that no colour reaches do not fit 8 bits; they are never read.
    hue_table, saturation_table = (torch.from_numpy(t.astype(np.uint8).ravel()) for t in (hue, saturation))
    return hue_table, saturation_table


def to_hsv(frame: Frame) -> torch.Tensor:
    """RGB to HSV in OpenCV's 8-bit convention (hue 0..179, its fixed-point rounding). uint8 [H, W, 3] both."""
    hue, saturation = _tables()
    planes = np.ascontiguousarray(frame.reshape(-1, 3).T)
    most, least = (f(f(planes[0], planes[1]), planes[2]) for f in (np.maximum, np.minimum))
    value, spread = torch.from_numpy(most), torch.from_numpy(most - least)
    red, green, _ = torch.from_numpy(planes)
    r, g, b = torch.from_numpy(planes).to(torch.int32)
    by_green = torch.where(value == green, (b - r).add_(768), (r - g).add_(1280))
    case = torch.where(value == red, (g - b).add_(256), by_green)
    case.bitwise_left_shift_(8).bitwise_or_(spread)
    shade = spread.to(torch.int32).bitwise_left_shift_(8).bitwise_or_(value)
    hsv = torch.stack([hue.index_select(0, case), saturation.index_select(0, shade), value], dim=-1)
    return hsv.view(frame.shape)


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
        """The 28x28 patches [n, 784 * 3] and their lengths [n]."""
        hsv = to_hsv(resize_frame(frame, self.size, "bilinear"))
        rows, columns = self.size[0] // FACTOR, self.size[1] // FACTOR
        cut = hsv.view(rows, FACTOR, columns, FACTOR, 3).transpose(1, 2).reshape(rows * columns, -1).float()
        return cut, cut.norm(dim=1) + 1e-8

    def _differs(self, a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]) -> bool:
        lit = ~((a[1] < 0.01) & (b[1] < 0.01))  # two black patches say nothing
        similar = ((a[0] * b[0]).sum(1) / (a[1] * b[1]) > self.patch_threshold)[lit]
        # As published: a mean in fp32 against a threshold in double precision, where 9 of 10 patches are below 0.9.
        # Without a lit patch the mean is NaN, hence not different.
        return float(similar.float().mean()) < self.threshold


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

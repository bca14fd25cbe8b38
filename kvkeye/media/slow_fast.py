"""Version 1.5's slow and fast frames: which is which, and how large each kind may be.

A frame that differs enough from the last slow frame is slow (type 0) and gets the larger size; the others are fast
(type 1). The rule and its constants are those of the published client utilities, version 1.5.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvkeye import ops
from kvkeye.media.frame import Frame
from kvkeye.media.resize import FACTOR, as_picture, client_size, resize_frame
from kvkeye.media.sampling import TOKEN, VideoPolicy

SLOW, FAST = 0, 1
_DOUBT = 3e-4  # what fp32 sums of 3 * 28 * 28 terms may be off by


class FrameTyper:
    """Types frames one by one; keeps only the patches of the last slow frame."""

    def __init__(self, height: int, width: int, policy: VideoPolicy, min_frame_similarity: float | None) -> None:
        self.size = client_size(height, width, policy.min_pixels, policy.typing_max_pixels)
        self.threshold = policy.min_frame_similarity if min_frame_similarity is None else min_frame_similarity
        self.patch_threshold = policy.min_patch_similarity
        self.last_slow: Patches | None = None

    def type(self, frame: Frame) -> int:
        """SLOW or FAST for the next frame, uint8 [H, W, 3]."""
        patches = Patches.of(resize_frame(frame, self.size))
        if self.last_slow is not None and not self._differs(self.last_slow, patches):
            return FAST
        self.last_slow = patches
        return SLOW

    def _differs(self, a: Patches, b: Patches) -> bool:
        lit = (a.squares > 0) | (b.squares > 0)  # two black patches say nothing
        cosines = ops.patch_products(a.levels, b.levels) / (a.squares.sqrt() * b.squares.sqrt()).clamp_(min=1.0)
        if bool(((cosines - self.patch_threshold).abs() < _DOUBT).any()):
            cosines = _published_cosines(a.levels, b.levels)
        similar = (cosines > self.patch_threshold)[lit]
        # As published: a mean in fp32 against a threshold in double precision, where 9 of 10 patches are below 0.9.
        # Without a lit patch the mean is NaN, hence not different.
        return float(similar.float().mean()) < self.threshold


@dataclass(frozen=True)
class Patches:
    """Hue, saturation and value of one frame's patches, and their squared lengths.

    levels  uint8 [n, 3 * 28 * 28]      squares  float64 [n], whole numbers
    """

    levels: torch.Tensor
    squares: torch.Tensor

    @classmethod
    def of(cls, frame: Frame) -> Patches:
        levels = ops.hsv_patches(as_picture(frame), FACTOR)
        return cls(levels, ops.patch_products(levels, levels).double())


def _published_cosines(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The cosines as the reference sums them, in fp32; their rounding decides where the exact ones are too close."""
    first, second = (levels.float() / (levels.float().norm(dim=-1, keepdim=True) + 1e-8) for levels in (a, b))
    cosines: torch.Tensor = (first * second).sum(-1)
    return cosines


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

"""Numbers about a long clip that need no pretrained network, gathered frame by frame in constant memory per frame.

A frozen clip has the best flicker, drift and similarity: always read `motion` and `loop` beside them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

POOL = 8
EDGE = 8  # frames at either end whose means are compared
MIN_LAG = 8


@dataclass(frozen=True)
class VideoScores:
    """Section by section of a clip [F, 3, H, W] in [0, 1] with borders (first frames after a seam) in pixel frames.

    seam_ratio     mean border frame difference over the median of the others, those within 2 of a border left out
    seam_jerk      largest second difference at a border over the median elsewhere
    luma_flicker   energy of the mean luma's upper half band
    flicker        1 - mean absolute frame difference (VBench's temporal flickering)
    color_drift    largest channel difference of the means of the first and the last 8 frames
    subject        VBench's subject formula on 8 x 8 pooled frames: mean of (cosine to previous + cosine to first) / 2
    motion         mean over pairs of the largest 5 % of pixel changes, less the clip's noise floor
    loop           largest mean cosine of frames a fixed lag apart, the mean frame removed
    """

    num_frames: int
    seam_ratio: float
    seam_jerk: float
    luma_flicker: float
    flicker: float
    color_drift: float
    subject: float
    motion: float
    loop: float


class VideoMetrics:
    """Takes frames piece by piece; `scores` may be asked for at any time.

    `curves` are per frame: difference to the frame before, second difference, mean luma, channel means.
    """

    def __init__(self) -> None:
        self._last: list[Tensor] = []
        self.difference: list[float] = []  # from frame 1 on
        self.jerk: list[float] = []  # centred at frame 1 on
        self._top: list[float] = []
        self._floor: list[float] = []
        self._means: list[Tensor] = []
        self._pooled: list[Tensor] = []

    def add(self, frames: Tensor) -> None:
        """Appends [n, 3, H, W] in [0, 1]."""
        for frame in frames.float():
            self._means.append(frame.mean((1, 2)))
            self._pooled.append(F.adaptive_avg_pool2d(frame, POOL).flatten())
            if self._last:
                change = (frame - self._last[-1]).abs()
                self.difference.append(float(change.mean()))
                flat = change.mean(0).flatten()
                self._top.append(float(flat.topk(math.ceil(0.05 * len(flat))).values.mean()))
                self._floor.append(float(flat.median()))
            if len(self._last) == 2:
                self.jerk.append(float((frame - 2 * self._last[1] + self._last[0]).abs().mean()))
            self._last = [*self._last[-1:], frame]

    @property
    def luma(self) -> Tensor:
        """Mean luma per frame: [F]."""
        luma: Tensor = torch.stack(self._means) @ torch.tensor([0.299, 0.587, 0.114])
        return luma

    @property
    def motion(self) -> list[float]:
        """Mean of the largest 5 % of pixel changes less the median change, from frame 1 on."""
        return [top - floor for top, floor in zip(self._top, self._floor)]

    @property
    def channels(self) -> Tensor:
        """Channel means per frame: [F, 3]."""
        return torch.stack(self._means)

    def similarity(self) -> Tensor:
        """Cosine of each frame to the first, pooled and mean-removed: [F]."""
        x = _features(torch.stack(self._pooled))
        cosines: Tensor = x @ x[0]
        return cosines

    def loop_curve(self) -> Tensor:
        """Mean cosine at each lag from `MIN_LAG` on, the clip's mean frame removed: [F - MIN_LAG - 1], may be empty."""
        pooled = torch.stack(self._pooled)
        centred = pooled - pooled.mean(0)
        x = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-8)
        lags = range(MIN_LAG, max(MIN_LAG, len(x) - MIN_LAG))
        return torch.tensor([float((x[lag:] * x[:-lag]).sum(1).mean()) for lag in lags])

    def scores(self, borders: Sequence[int] = ()) -> VideoScores:
        """All scalars. Raises ValueError for fewer than three frames."""
        if len(self._means) < 3:
            raise ValueError(f"video metrics: got {len(self._means)} frames; at least 3 are required.")
        difference, jerk = torch.tensor(self.difference), torch.tensor(self.jerk)
        at = torch.arange(1, len(difference) + 1)  # the frame that a difference leads to
        near = torch.tensor([any(abs(int(frame) - b) <= 2 for b in borders) for frame in at])
        on = torch.tensor([int(frame) in set(borders) for frame in at])
        inner = difference[~near]
        ratio = float(difference[on].mean() / inner.median().clamp_min(1e-8)) if on.any() and len(inner) else 1.0
        centre = torch.arange(1, len(jerk) + 1)
        bordering = torch.tensor([any(int(frame) in (b - 1, b) for b in borders) for frame in centre])
        away = jerk[~bordering]
        jerks = float(jerk[bordering].max() / away.median().clamp_min(1e-8)) if bordering.any() and len(away) else 1.0
        x = _features(torch.stack(self._pooled))
        steps = ((x[1:] * x[:-1]).sum(1).clamp_min(0) + (x[1:] @ x[0]).clamp_min(0)) / 2
        edge = min(EDGE, len(self._means) // 2)
        ends = self.channels[:edge].mean(0) - self.channels[-edge:].mean(0)
        loop = self.loop_curve()
        return VideoScores(
            num_frames=len(self._means),
            seam_ratio=ratio,
            seam_jerk=jerks,
            luma_flicker=_upper_band(self.luma),
            flicker=1 - float(difference.mean()),
            color_drift=float(ends.abs().max()),
            subject=float(steps.mean()),
            motion=sum(self.motion) / len(self.motion),
            loop=float(loop.max()) if len(loop) else 0.0,
        )


def _features(pooled: Tensor) -> Tensor:
    """Pooled frames, their own mean removed, of length 1."""
    centred = pooled - pooled.mean(1, keepdim=True)
    features: Tensor = centred / centred.norm(dim=1, keepdim=True).clamp_min(1e-8)
    return features


def _upper_band(series: Tensor) -> float:
    """Root mean square of a series' frequencies above half of the Nyquist frequency."""
    spectrum = torch.fft.rfft(series - series.mean())
    spectrum[: len(spectrum) // 2] = 0
    return float(torch.fft.irfft(spectrum, n=len(series)).square().mean().sqrt())

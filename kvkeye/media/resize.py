"""Target sizes and resampling. Sides in pixels, (height, width) order; frames are uint8 RGB arrays.

Two variants of the size rule are in use and differ only for sides below the factor (28 = patch 14 x merge 2):
the processor's first enlarges such a side to the factor, the client utilities' clamps it.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image

from kvkeye import ops
from kvkeye.media.frame import Frame, check_aspect

BILINEAR, BICUBIC = 2, 3  # Pillow's numbers, as `resample` in preprocessor_config.json
FACTOR = 28


def processor_size(
    height: int, width: int, min_pixels: int, max_pixels: float, factor: int = FACTOR
) -> tuple[int, int]:
    """Size rule of the checkpoint's image processor: multiples of `factor`, area within the limits."""
    check_aspect(height, width)
    h, w = float(height), float(width)
    if h < factor:
        h, w = factor, round(w * factor / h)
    if w < factor:
        h, w = round(h * factor / w), factor
    return _fit(h, w, round(h / factor) * factor, round(w / factor) * factor, min_pixels, max_pixels, factor)


def client_size(height: int, width: int, min_pixels: int, max_pixels: float, factor: int = FACTOR) -> tuple[int, int]:
    """Size rule of the reference's client utilities, which also size the frames of a clip."""
    check_aspect(height, width)
    rows, columns = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    rows, columns = _fit(height, width, rows, columns, min_pixels, max_pixels, factor)
    return max(rows, factor), max(columns, factor)


def _fit(
    height: float, width: float, rows: int, columns: int, min_pixels: int, max_pixels: float, factor: int
) -> tuple[int, int]:
    """Shrinks or enlarges by the unrounded sides; Python's rounding of ties to even is part of the rule."""
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows, columns = (math.floor(side / scale / factor) * factor for side in (height, width))
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * scale / factor) * factor for side in (height, width))
    return rows, columns


def as_picture(frame: Frame) -> torch.Tensor:
    """uint8 [height, width, 3]; shares memory where the array allows it."""
    return torch.from_numpy(np.require(frame, requirements=["C", "W"]))


def as_tensor(frame: Frame) -> torch.Tensor:
    """uint8 [1, 3, height, width]; shares memory where the array allows it."""
    return as_picture(frame).permute(2, 0, 1)[None]


def resize_image(frame: Frame, size: tuple[int, int], resample: int = BICUBIC) -> Frame:
    """Pillow's antialiased resampling of one picture (horizontal pass first, as in versions below 13)."""
    if frame.shape[:2] == size:
        return frame
    if resample == BICUBIC:
        return _resized(frame, size, False)
    return np.asarray(Image.fromarray(frame).resize((size[1], size[0]), Image.Resampling(resample)))


def resize_frame(frame: Frame, size: tuple[int, int]) -> Frame:
    """1.5's rule for the frames of a clip: torch's uint8 bilinear interpolation, antialiased.

    Fixed-point weights, rounded after each of the two passes, as the checkpoint's processor has it.
    """
    return frame if frame.shape[:2] == size else _resized(frame, size, True)


class BicubicResizer:
    """Preview's rule for the frames of a clip: torch's antialiased bicubic interpolation in fp32, rounded once.

    Keeps its buffers: with fresh ones of this size the system would spend more time on pages than torch on sums.
    """

    def __init__(self, height: int, width: int, size: tuple[int, int]) -> None:
        self._is_needed = (height, width) != size
        self._source = torch.empty(1, 3, height, width)  # torch is faster on planes than on pixels
        self._target = torch.empty(1, 3, *size)
        self._levels = torch.empty(3, *size, dtype=torch.uint8)
        self._frame = torch.empty(*size, 3, dtype=torch.uint8)

    def __call__(self, frame: Frame) -> Frame:
        """uint8 [H, W, 3], valid until the next call."""
        if not self._is_needed:
            return frame
        size = list(self._target.shape[2:])
        self._source.copy_(as_tensor(frame))
        torch.ops.aten._upsample_bicubic2d_aa.out(self._source, size, False, None, None, out=self._target)
        self._levels.copy_(self._target[0].round_().clamp_(0, 255))
        resized: Frame = torch.stack(self._levels.unbind(), dim=-1, out=self._frame).numpy()
        return resized


def _resized(frame: Frame, size: tuple[int, int], bilinear: bool) -> Frame:
    resized: Frame = ops.resize_image(as_picture(frame), *size, bilinear).numpy()
    return resized

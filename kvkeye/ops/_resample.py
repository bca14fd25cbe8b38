"""Reference of the antialiased resize of 8-bit pictures, in integers: the rule of csrc/include/kvkeye/resample.h.

Bicubic gives Pillow's levels (below version 13), bilinear those of torch's uint8 interpolation with antialias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_PILLOW_PRECISION = 22


def resized(image: Tensor, rows: int, columns: int, bilinear: bool) -> Tensor:
    """uint8 [H, W, 3] to int32 levels [rows, columns, 3]: horizontally first, 8 bits between the passes."""
    levels = image.int()
    for axis, size in ((1, columns), (0, rows)):
        if levels.shape[axis] != size:
            levels = _pass(levels, axis, size, bilinear)
    return levels


def _pass(levels: Tensor, axis: int, size: int, bilinear: bool) -> Tensor:
    first, weights, precision = axis_weights(levels.shape[axis], size, bilinear)
    first, weights = first.to(levels.device), weights.to(levels.device)
    shape = [1, 1, 1]
    shape[axis] = size
    total = torch.full((), 1 << (precision - 1), dtype=torch.int32, device=levels.device)
    for tap in range(weights.shape[1]):
        source = levels.index_select(axis, (first + tap).clamp(max=levels.shape[axis] - 1))
        total = total + weights[:, tap].view(shape) * source
    return (total >> precision).clamp(0, 255)


def axis_weights(size: int, target: int, bilinear: bool) -> tuple[Tensor, Tensor, int]:
    """First input of each output [target] int64, its weights [target, taps] int32, their fixed-point digits."""
    scale = size / target
    stretch = max(scale, 1.0)
    support = (1.0 if bilinear else 2.0) * stretch
    taps = math.ceil(support) * 2 + 1
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * scale  # [target]
    first = (centre - support + 0.5).long().clamp(min=0)
    last = torch.minimum((centre + support + 0.5).long().clamp(max=size), first + taps)
    inputs = first[:, None] + torch.arange(taps)  # [target, taps]
    values = _filter((inputs.double() - centre[:, None] + 0.5) * (1.0 / stretch), bilinear)
    values = torch.where(inputs < last[:, None], values, torch.zeros_like(values))
    total = torch.zeros_like(centre)
    for tap in range(taps):  # in this order: the last bit counts
        total = total + values[:, tap]
    values = values / torch.where(total == 0, torch.ones_like(total), total)[:, None]
    precision = _int16_precision(float(values.max())) if bilinear else _PILLOW_PRECISION
    scaled = values * float(1 << precision)
    return first, (scaled + torch.where(scaled < 0, -0.5, 0.5)).int(), precision


def _filter(x: Tensor, bilinear: bool) -> Tensor:
    x = x.abs()
    if bilinear:
        return (1.0 - x).clamp(min=0.0)
    a = -0.5
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, torch.zeros_like(x)))


def _int16_precision(largest: float) -> int:
    precision = 0
    while precision < 22 and int(0.5 + largest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    return precision

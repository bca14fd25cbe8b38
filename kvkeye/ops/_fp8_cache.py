"""Keys and values as e4m3 levels: each head of each token has a scale of its own, its largest value over 448."""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide

FP8 = torch.float8_e4m3fn
_MOST = 448.0  # the largest e4m3 value


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [..., D] -> values / scale, not yet rounded to e4m3 [..., D], and scales [...].

    A row with an infinity or a NaN has the scale NaN, which gives NaN wherever it is used, and levels of 0.
    """
    rows = wide(rows)
    largest = rows.abs().amax(-1)
    scales = torch.where(largest.isfinite(), largest / _MOST, torch.nan)
    levels = torch.where((scales > 0)[..., None], rows / scales[..., None], 0.0)
    return levels.clamp(-_MOST, _MOST), scales  # a scale below fp32's normal numbers is too coarse


def dequantized(levels: Tensor, scales: Optional[Tensor]) -> Tensor:
    """levels [..., D], scales [...] -> values [..., D]; without scales, the levels are the values."""
    return levels if scales is None else wide(levels) * scales[..., None]


def scales_fit(k_cache: Tensor, k_scales: Optional[Tensor], v_scales: Optional[Tensor]) -> Iterator[str]:
    """Sentences that say why these scales do not go with caches [N, Hkv, P, D]."""
    expected = list(k_cache.shape[:3])
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if k_cache.dtype != FP8:
            if scales is not None:
                yield f"{name} are given, but the cache is {k_cache.dtype}; scales go with torch.float8_e4m3fn"
        elif scales is None or scales.dtype != torch.float32 or list(scales.shape) != expected:
            given = "None" if scales is None else f"{scales.dtype} {tuple(scales.shape)}"
            yield f"{name} is {given}; torch.float8_e4m3fn caches need fp32 {expected}"

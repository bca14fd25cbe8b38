"""Launching kernels and choosing their widths. Knows shapes and devices, reads no tensor's values."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Runs `kernel` over `grid` on the device of its tensors; an empty grid is no launch."""
    if 0 not in grid:
        # Said here, because Triton's default changes with its version, and bits with it.
        _start(kernel, grid, args, {"enable_fp_fusion": True, **options})


def _start(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    anchor = next(a for a in args if isinstance(a, Tensor))
    with torch.cuda.device_of(anchor):
        kernel[grid](*args, **options)


def lanes_for(width: int) -> int:
    """Lanes of a tile that holds `width` elements: the next power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def warps_for(elements: int) -> int:
    """Warps of a program whose tile holds `elements`: about 32 elements per thread, 1 to 16 warps."""
    return min(16, max(1, triton.next_power_of_2(elements) // 1024))


def as_rows(x: Tensor) -> Tensor:
    """`x` as [rows, last axis] with elements of a row adjacent; a copy only where no view exists."""
    width = x.shape[-1]
    rows = x.reshape(x.numel() // max(width, 1), width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def as_heads(x: Tensor) -> Tensor:
    """`x` [T, H, D] with elements of a head adjacent; a copy only where they are not."""
    return x if x.stride(2) == 1 else x.contiguous()

"""Sums over programs in an order that never changes: each program writes its part, one kernel adds them up."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

#: Programs that share a sum over rows. A constant: the order of the sum must not depend on the device.
MAX_PARTS = 256


@triton.jit
def _sum_parts_kernel(
    parts_ptr, out_ptr, num_parts, stride_part, WIDTH: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr
):
    lanes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    total = tl.zeros([LANES], tl.float32)
    for first in range(0, num_parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part[:, None] < num_parts) & (lanes[None, :] < WIDTH)
        total += tl.sum(tl.load(parts_ptr + part[:, None] * stride_part + lanes[None, :], mask, other=0.0), 0)
    tl.store(out_ptr + lanes, total, lanes < WIDTH)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[P, W] fp32 -> [W] in `dtype`: tiles of 32 parts, tile after tile."""
    width = parts.shape[1]
    out = torch.empty(width, dtype=dtype, device=parts.device)
    launch(
        _sum_parts_kernel, (triton.cdiv(width, 64),), parts, out, parts.shape[0], parts.stride(0),
        WIDTH=width, PARTS=32, LANES=64, num_warps=4,
    )  # fmt: skip
    return out

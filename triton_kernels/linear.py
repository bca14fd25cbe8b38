"""Matrix products with one order of summation: the tile and the order of K do not depend on the number of rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import as_rows, launch
from .common.refusals import interpreted_bf16
from .common.tiles import tile_for


@triton.jit
def _grouped_tile(num_m, num_n, GROUP_M: tl.constexpr):
    """(row tile, column tile): GROUP_M row tiles walk the columns together, so that weights are found in L2."""
    pid = tl.program_id(0)
    group = pid // (GROUP_M * num_n)
    height = tl.minimum(num_m - group * GROUP_M, GROUP_M)
    within = pid % (GROUP_M * num_n)
    return group * GROUP_M + within % height, within // height


@triton.jit
def _packed_linear_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, M, N, K: tl.constexpr, STRIDE_X: tl.constexpr, STRIDE_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    tile_m, tile_n = _grouped_tile(tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Clamped, not masked: a masked row costs a predicate per load, a repeated one is only never stored.
    x_tile = x_ptr + tl.minimum(rows, M - 1)[:, None] * STRIDE_X + depth[None, :]
    w_tile = weight_ptr + tl.minimum(columns, N - 1)[None, :] * STRIDE_WEIGHT + depth[:, None]
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            x, w = tl.load(x_tile), tl.load(w_tile)
        else:
            x = tl.load(x_tile, depth[None, :] < K - first, other=0.0)
            w = tl.load(w_tile, depth[:, None] < K - first, other=0.0)
        sums = tl.dot(x, w, sums, input_precision="ieee")
        x_tile += BLOCK_K
        w_tile += BLOCK_K
    if HAS_BIAS:
        sums += tl.load(bias_ptr + columns, columns < N, other=0.0).to(tl.float32)[None, :]
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    tl.store(y_ptr + rows[:, None] * N + columns[None, :], sums, mask)


def packed_linear_refuses(x: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[str]:
    yield from interpreted_bf16(x)
    if weight.stride(1) != 1:
        yield f"weight.stride(1) is {weight.stride(1)}; its rows must be contiguous (call .contiguous() once)"


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See kvkeye.ops.packed_linear."""
    rows, (width, depth) = as_rows(x), weight.shape
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    # One tile for every number of rows, so that a row's bits do not depend on its batch: where rows are few, the
    # weights' way from memory is the limit, not the idle rows.
    tile = tile_for("packed_linear_fwd", x)
    num_rows = y.numel() // max(width, 1)
    launch(
        _packed_linear_fwd_kernel, (triton.cdiv(num_rows, tile["BLOCK_M"]) * triton.cdiv(width, tile["BLOCK_N"]),),
        rows, weight, weight if bias is None else bias.contiguous(), y, num_rows, width,
        # Constants, because the compiler infers no alignment for an argument such as 588 and would load singly.
        K=depth, STRIDE_X=rows.stride(0), STRIDE_WEIGHT=weight.stride(0), HAS_BIAS=bias is not None, **tile,
    )  # fmt: skip
    return y

"""Attention of packed sequences, forward: online softmax over key tiles, one query tile of one head per program."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import as_heads, launch
from ..common.tiles import tile_for
from .lanes import (
    LN_2,
    LOG2_E,
    accumulate,
    attention_refuses,
    find_tile,
    inner_product,
    lane_constants,
    load_rows,
    store_rows,
    zero_rows,
)


@triton.jit
def _visit_tiles(
    sums, sums_tail, peak, total, q, q_tail, rows, k_ptr, v_ptr, stride_k, stride_v, first, end, length, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Takes the key tiles [first, end) into the running sums; only MASKED tiles look at positions."""
    for start in range(first, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < length if MASKED else tl.full([BLOCK_N], True, tl.int1)
        k, k_tail = load_rows(k_ptr, columns.to(tl.int64) * stride_k, inside, D, D0, D1)
        scores = inner_product(q, q_tail, k, k_tail, D1)
        if MASKED:
            seen = inside[None, :]
            if CAUSAL:
                seen = seen & (columns[None, :] <= rows[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        weights = tl.exp2(tl.fma(scores, scale, -higher[:, None]))
        decay = tl.exp2(peak - higher)
        total = tl.fma(total, decay, tl.sum(weights, 1))
        v, v_tail = load_rows(v_ptr, columns.to(tl.int64) * stride_v, inside, D, D0, D1)
        sums, sums_tail = sums * decay[:, None], sums_tail * decay[:, None]
        sums, sums_tail = accumulate(sums, sums_tail, weights.to(v.dtype), v, v_tail, D1)
        peak = higher
    return sums, sums_tail, peak, total


@triton.jit
def _varlen_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, cu_seqlens_ptr, num_sequences, num_steps, stride_q, stride_k, stride_v, scale,
    STRIDE_Q_HEAD: tl.constexpr, STRIDE_K_HEAD: tl.constexpr, STRIDE_V_HEAD: tl.constexpr,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    # Last tile first: under a causal mask it has the most to do.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, index = find_tile(tile, cu_seqlens_ptr, num_sequences, num_steps, 1, BLOCK_M)
    begin = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    first_row = index * BLOCK_M
    if first_row >= length:
        return
    begin = begin.to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    q_base = q_ptr + begin * stride_q + head * STRIDE_Q_HEAD
    k_base = k_ptr + begin * stride_k + head // GROUP * STRIDE_K_HEAD
    v_base = v_ptr + begin * stride_v + head // GROUP * STRIDE_V_HEAD
    q, q_tail = load_rows(q_base, rows.to(tl.int64) * stride_q, rows < length, D, D0, D1)
    sums, sums_tail = zero_rows(BLOCK_M, D0, D1)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    end = tl.minimum(length, first_row + BLOCK_M) if CAUSAL else length
    whole = (first_row if CAUSAL else length) // BLOCK_N * BLOCK_N
    sums, sums_tail, peak, total = _visit_tiles(
        sums, sums_tail, peak, total, q, q_tail, rows, k_base, v_base, stride_k, stride_v, 0, whole, length, scale,
        CAUSAL, False, D, D0, D1, BLOCK_N,
    )  # fmt: skip
    sums, sums_tail, peak, total = _visit_tiles(
        sums, sums_tail, peak, total, q, q_tail, rows, k_base, v_base, stride_k, stride_v, whole, end, length, scale,
        CAUSAL, True, D, D0, D1, BLOCK_N,
    )  # fmt: skip
    place = (begin + rows) * num_heads + head
    sums, sums_tail = sums / total[:, None], sums_tail / total[:, None]
    store_rows(o_ptr, place * D, sums, sums_tail, rows < length, D, D0, D1)
    tl.store(lse_ptr + place, (peak + tl.log2(total)) * LN_2, rows < length)


def varlen_attention_refuses(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, softmax_scale: float
) -> Iterator[str]:
    yield from attention_refuses(q, cu_seqlens.shape[0] - 1, softmax_scale)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, causal: bool, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """See kvkeye.ops.varlen_attention."""
    q, k, v = as_heads(q), as_heads(k), as_heads(v)
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    tile = tile_for("varlen_attention_fwd", q, q.shape[2])
    num_sequences = cu_seqlens.shape[0] - 1
    grid = (q.shape[0] // tile["BLOCK_M"] + num_sequences if q.shape[0] else 0, q.shape[1])
    launch(
        _varlen_attention_fwd_kernel, grid, q, k, v, o, lse, cu_seqlens.contiguous(), num_sequences,
        num_sequences.bit_length(),
        q.stride(0), k.stride(0), v.stride(0), softmax_scale * LOG2_E,
        # Constants, because the compiler infers no alignment for an argument such as 72 and would load elements singly.
        STRIDE_Q_HEAD=q.stride(1), STRIDE_K_HEAD=k.stride(1), STRIDE_V_HEAD=v.stride(1),
        GROUP=q.shape[1] // k.shape[1], CAUSAL=causal, **lane_constants(q.shape[2]), **tile,
    )  # fmt: skip
    return o, lse

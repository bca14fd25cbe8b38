"""Gradients of attention over packed sequences, without atomics.

Three kernels: delta = sum(do o) - dlse per row; dk and dv with one key tile per program, which walks all query
heads of its group; dq with one query tile per program. With p = softmax and s = scaled scores,
ds = p (do v^T - delta), dq = scale ds k, dk = scale ds^T q, dv = p^T do.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import as_heads, launch, warps_for
from ..common.tiles import tile_for
from .lanes import (
    LOG2_E,
    accumulate,
    attention_refuses,
    inner_product,
    lane_constants,
    load_rows,
    store_rows,
    zero_rows,
)

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _varlen_attention_bwd_delta_kernel(
    do_ptr, dlse_ptr, o_ptr, delta_ptr, num_rows, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    mask = rows < num_rows
    do, do_tail = load_rows(do_ptr, rows * D, mask, D, D0, D1)
    o, o_tail = load_rows(o_ptr, rows * D, mask, D, D0, D1)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(do_tail.to(tl.float32) * o_tail.to(tl.float32), 1)
    tl.store(delta_ptr + rows, delta - tl.load(dlse_ptr + rows, mask, other=0.0), mask)


@triton.jit
def _varlen_attention_bwd_dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_seqlens_ptr,
    num_q_heads, stride_q, stride_k, stride_v, softmax_scale,
    STRIDE_Q_HEAD: tl.constexpr, STRIDE_K_HEAD: tl.constexpr, STRIDE_V_HEAD: tl.constexpr,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    begin = tl.load(cu_seqlens_ptr + tl.program_id(2))
    length = tl.load(cu_seqlens_ptr + tl.program_id(2) + 1) - begin
    first_column = tl.program_id(0) * BLOCK_N
    if first_column >= length:
        return
    begin = begin.to(tl.int64)
    columns = first_column + tl.arange(0, BLOCK_N)
    inside = columns < length
    k_base = k_ptr + begin * stride_k + kv_head * STRIDE_K_HEAD
    v_base = v_ptr + begin * stride_v + kv_head * STRIDE_V_HEAD
    k, k_tail = load_rows(k_base, columns.to(tl.int64) * stride_k, inside, D, D0, D1)
    v, v_tail = load_rows(v_base, columns.to(tl.int64) * stride_v, inside, D, D0, D1)
    dk, dk_tail = zero_rows(BLOCK_N, D0, D1)
    dv, dv_tail = zero_rows(BLOCK_N, D0, D1)
    first_row = first_column // BLOCK_M * BLOCK_M if CAUSAL else 0
    for head in range(kv_head * GROUP, (kv_head + 1) * GROUP):
        q_base = q_ptr + begin * stride_q + head * STRIDE_Q_HEAD
        for start in range(first_row, length, BLOCK_M):
            rows = start + tl.arange(0, BLOCK_M)
            place = (begin + rows) * num_q_heads + head
            q, q_tail = load_rows(q_base, rows.to(tl.int64) * stride_q, rows < length, D, D0, D1)
            do, do_tail = load_rows(do_ptr, place * D, rows < length, D, D0, D1)
            lse = tl.load(lse_ptr + place, rows < length, other=0.0) * _LOG2_E
            delta = tl.load(delta_ptr + place, rows < length, other=0.0)
            scores = inner_product(k, k_tail, q, q_tail, D1)  # [N, M]
            weights = tl.exp2(tl.fma(scores, softmax_scale * _LOG2_E, -lse[None, :]))
            seen = inside[:, None] & (rows < length)[None, :]
            if CAUSAL:
                seen = seen & (columns[:, None] <= rows[None, :])
            weights = tl.where(seen, weights, 0.0)
            dv, dv_tail = accumulate(dv, dv_tail, weights.to(do.dtype), do, do_tail, D1)
            slopes = weights * (inner_product(v, v_tail, do, do_tail, D1) - delta[None, :])
            dk, dk_tail = accumulate(dk, dk_tail, slopes.to(q.dtype), q, q_tail, D1)
    place = ((begin + columns) * tl.num_programs(1) + kv_head) * D
    store_rows(dk_ptr, place, dk * softmax_scale, dk_tail * softmax_scale, inside, D, D0, D1)
    store_rows(dv_ptr, place, dv, dv_tail, inside, D, D0, D1)


@triton.jit
def _varlen_attention_bwd_dq_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, cu_seqlens_ptr,
    stride_q, stride_k, stride_v, softmax_scale,
    STRIDE_Q_HEAD: tl.constexpr, STRIDE_K_HEAD: tl.constexpr, STRIDE_V_HEAD: tl.constexpr,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, num_heads = tl.program_id(1), tl.num_programs(1)
    begin = tl.load(cu_seqlens_ptr + tl.program_id(2))
    length = tl.load(cu_seqlens_ptr + tl.program_id(2) + 1) - begin
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    if first_row >= length:
        return
    begin = begin.to(tl.int64)
    rows = first_row + tl.arange(0, BLOCK_M)
    within = rows < length
    place = (begin + rows) * num_heads + head
    q_base = q_ptr + begin * stride_q + head * STRIDE_Q_HEAD
    k_base = k_ptr + begin * stride_k + head // GROUP * STRIDE_K_HEAD
    v_base = v_ptr + begin * stride_v + head // GROUP * STRIDE_V_HEAD
    q, q_tail = load_rows(q_base, rows.to(tl.int64) * stride_q, within, D, D0, D1)
    do, do_tail = load_rows(do_ptr, place * D, within, D, D0, D1)
    lse = tl.load(lse_ptr + place, within, other=0.0) * _LOG2_E
    delta = tl.load(delta_ptr + place, within, other=0.0)
    dq, dq_tail = zero_rows(BLOCK_M, D0, D1)
    end = tl.minimum(length, first_row + BLOCK_M) if CAUSAL else length
    for start in range(0, end, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < length
        k, k_tail = load_rows(k_base, columns.to(tl.int64) * stride_k, inside, D, D0, D1)
        v, v_tail = load_rows(v_base, columns.to(tl.int64) * stride_v, inside, D, D0, D1)
        scores = inner_product(q, q_tail, k, k_tail, D1)  # [M, N]
        weights = tl.exp2(tl.fma(scores, softmax_scale * _LOG2_E, -lse[:, None]))
        seen = inside[None, :] & within[:, None]
        if CAUSAL:
            seen = seen & (columns[None, :] <= rows[:, None])
        slopes = tl.where(seen, weights, 0.0) * (inner_product(do, do_tail, v, v_tail, D1) - delta[:, None])
        dq, dq_tail = accumulate(dq, dq_tail, slopes.to(k.dtype), k, k_tail, D1)
    store_rows(dq_ptr, place * D, dq * softmax_scale, dq_tail * softmax_scale, within, D, D0, D1)


def varlen_attention_backward_refuses(
    grad_0: Tensor, grad_1: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    causal: bool, softmax_scale: float, out_0: Tensor, out_1: Tensor,
) -> Iterator[str]:  # fmt: skip
    yield from attention_refuses(q, cu_seqlens.shape[0] - 1, softmax_scale)


def _deltas(do: Tensor, dlse: Tensor, o: Tensor) -> Tensor:
    """sum(do o) - dlse, fp32 [T, Hq]."""
    delta = torch.empty(dlse.shape, dtype=torch.float32, device=do.device)
    launch(
        _varlen_attention_bwd_delta_kernel, (triton.cdiv(delta.numel(), 16),), do, dlse.contiguous(), o.contiguous(),
        delta, delta.numel(), ROWS=16, num_warps=warps_for(16 * do.shape[2]), **lane_constants(do.shape[2]),
    )  # fmt: skip
    return delta


def varlen_attention_backward(
    grad_0: Tensor, grad_1: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int,
    causal: bool, softmax_scale: float, out_0: Tensor, out_1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of varlen_attention: q, k, v. grad_0 and out_0 belong to o, grad_1 and out_1 to lse."""
    do, lse, cu_seqlens = grad_0.contiguous(), out_1.contiguous(), cu_seqlens.contiguous()
    q, k, v = as_heads(q), as_heads(k), as_heads(v)
    delta = _deltas(do, grad_1, out_0)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    constants = {
        "STRIDE_Q_HEAD": q.stride(1), "STRIDE_K_HEAD": k.stride(1), "STRIDE_V_HEAD": v.stride(1),
        "GROUP": q.shape[1] // k.shape[1], "CAUSAL": causal, **lane_constants(q.shape[2]),
    }  # fmt: skip
    key_tile, tile = (tile_for(f"varlen_attention_bwd_{side}", q, q.shape[2]) for side in ("dkv", "dq"))
    strides, num_sequences = (q.stride(0), k.stride(0), v.stride(0)), cu_seqlens.shape[0] - 1
    launch(
        _varlen_attention_bwd_dkv_kernel,
        (triton.cdiv(max_seqlen, key_tile["BLOCK_N"]), k.shape[1], num_sequences),
        do, q, k, v, lse, delta, dk, dv, cu_seqlens, q.shape[1], *strides, softmax_scale, **constants, **key_tile,
    )  # fmt: skip
    launch(
        _varlen_attention_bwd_dq_kernel,
        (triton.cdiv(max_seqlen, tile["BLOCK_M"]), q.shape[1], num_sequences),
        do, q, k, v, lse, delta, dq, cu_seqlens, *strides, softmax_scale, **constants, **tile,
    )  # fmt: skip
    return dq, dk, dv

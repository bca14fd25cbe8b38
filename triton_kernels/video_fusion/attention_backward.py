"""Gradients of attention in overlapping tiles, without atomics.

With L the denominators of a row's tiles, M the least of those that hold the key's frame too, P = exp(s - M) and
g = do.v: alpha = sum W exp(M - L), beta = sum (W delta - dlse) exp(M - L), ds = P (alpha g - beta), dv = P alpha do,
where delta of a tile is sum exp(s - L) g over its keys. The query kernel finds delta, the gradient of the weights and
dq; the key kernel walks the rows that see a block of keys.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.lanes import LOG2_E, accumulate, inner_product, load_rows, store_rows, zero_rows
from ..common.launch import launch
from ..common.sums import sum_parts
from ..common.tiles import tile_for
from .attention import as_tokens
from .slots import geometry, least_of, locate, mixed, neighbour, num_neighbours, shared_slots, slot_tables, tiles_refuse

_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _frame_slope(
    q, q_tail, do, do_tail, k_base, v_base, stride_k, stride_v, first, num_keys, scale, least,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """sum 2^(score - least) (do.v) over one frame's keys, per row."""
    slope = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < num_keys
        tokens = (first + columns).to(tl.int64)
        k, k_tail = load_rows(k_base, tokens * stride_k, inside, D, D0, D1)
        scores = inner_product(q, q_tail, k, k_tail, D1)
        weights = tl.where(inside[None, :], tl.exp2(tl.fma(scores, scale, -least[:, None])), 0.0)
        v, v_tail = load_rows(v_base, tokens * stride_v, inside, D, D0, D1)
        slope += tl.sum(weights * inner_product(do, do_tail, v, v_tail, D1), 1)
    return slope


@triton.jit
def _add_query_gradient(
    dq, dq_tail, q, q_tail, do, do_tail, k_base, v_base, stride_k, stride_v, first, num_keys, scale, least, alpha,
    beta, BLOCK_N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    for start in range(0, num_keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < num_keys
        tokens = (first + columns).to(tl.int64)
        k, k_tail = load_rows(k_base, tokens * stride_k, inside, D, D0, D1)
        scores = inner_product(q, q_tail, k, k_tail, D1)
        weights = tl.where(inside[None, :], tl.exp2(tl.fma(scores, scale, -least[:, None])), 0.0)
        v, v_tail = load_rows(v_base, tokens * stride_v, inside, D, D0, D1)
        slopes = weights * (inner_product(do, do_tail, v, v_tail, D1) * alpha[:, None] - beta[:, None])
        dq, dq_tail = accumulate(dq, dq_tail, slopes.to(k.dtype), k, k_tail, D1)
    return dq, dq_tail


@triton.jit(do_not_specialize=["num_frames", "num_text", "reach", "behind"])
def _tile_attention_bwd_dq_kernel(
    do_ptr, dlse_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, begins_ptr, shares_ptr, dq_ptr, slope_ptr, parts_ptr, num_tokens,
    stride_qb, stride_kb, stride_vb, stride_q, stride_k, stride_v, softmax_scale, num_frames, per_frame, num_text,
    blocks_per_frame, reach, behind, lse_size, num_places,
    STRIDE_Q_HEAD: tl.constexpr, STRIDE_K_HEAD: tl.constexpr, STRIDE_V_HEAD: tl.constexpr, LENGTH: tl.constexpr,
    SLOTS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, num_heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    frame, first, count = locate(tl.program_id(0), num_frames, per_frame, num_text, blocks_per_frame, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    within = rows < count
    tokens = (frame * per_frame + rows).to(tl.int64)
    k_base = k_ptr + batch * stride_kb + head * STRIDE_K_HEAD
    v_base = v_ptr + batch * stride_vb + head * STRIDE_V_HEAD
    q_base = q_ptr + batch * stride_qb + head * STRIDE_Q_HEAD
    place = ((batch * num_tokens + tokens) * num_heads + head) * D
    q, q_tail = load_rows(q_base, tokens * stride_q, within, D, D0, D1)
    do, do_tail = load_rows(do_ptr, place, within, D, D0, D1)
    slots = tl.arange(0, SLOTS)
    begins = tl.load(begins_ptr + frame * LENGTH + slots, slots < LENGTH, other=-1)
    shares = tl.load(shares_ptr + frame * LENGTH + slots, slots < LENGTH, other=0.0)
    exists = begins >= 0
    held = (batch * num_heads + head) * lse_size + begins[None, :] + rows[:, None]
    known = within[:, None] & exists[None, :]
    lse = tl.load(lse_ptr + held, known, other=0.0) * _LOG2_E  # [M, SLOTS]
    scale = softmax_scale * _LOG2_E
    delta = tl.zeros([BLOCK_M, SLOTS], tl.float32)
    for step in range(0, num_neighbours(frame, num_frames, reach)):
        other = neighbour(frame, step, num_frames, reach, behind)
        shared = shared_slots(slots, exists, frame, other, num_frames, LENGTH)
        if tl.max(shared.to(tl.int32), 0) > 0:
            num_keys = tl.where(other == num_frames, num_text, per_frame)
            least = least_of(lse, shared)
            slope = _frame_slope(
                q, q_tail, do, do_tail, k_base, v_base, stride_k, stride_v, other * per_frame, num_keys, scale, least,
                BLOCK_M, BLOCK_N, D, D0, D1,
            )  # fmt: skip
            shrink = tl.exp2(tl.where(shared[None, :], least[:, None] - lse, float("-inf")))
            delta += shrink * slope[:, None]
    part = (batch * num_heads + head) * blocks_per_frame + first // BLOCK_M
    of_tiles = exists & (begins < num_places * per_frame)
    found = tl.sum(tl.where(within[:, None], delta, 0.0), 0)
    tl.store(parts_ptr + part * num_places + begins // tl.maximum(per_frame, 1), found, of_tiles)
    slopes = delta * shares[None, :] - tl.load(dlse_ptr + held, known, other=0.0)
    tl.store(slope_ptr + held, slopes, known)
    dq, dq_tail = zero_rows(BLOCK_M, D0, D1)
    for step in range(0, num_neighbours(frame, num_frames, reach)):
        other = neighbour(frame, step, num_frames, reach, behind)
        shared = shared_slots(slots, exists, frame, other, num_frames, LENGTH)
        if tl.max(shared.to(tl.int32), 0) > 0:
            num_keys = tl.where(other == num_frames, num_text, per_frame)
            least = least_of(lse, shared)
            dq, dq_tail = _add_query_gradient(
                dq, dq_tail, q, q_tail, do, do_tail, k_base, v_base, stride_k, stride_v, other * per_frame, num_keys,
                scale, least, mixed(lse, least, shares[None, :], shared), mixed(lse, least, slopes, shared),
                BLOCK_N, D, D0, D1,
            )  # fmt: skip
    store_rows(dq_ptr, place, dq * softmax_scale, dq_tail * softmax_scale, within, D, D0, D1)


@triton.jit(do_not_specialize=["num_frames", "num_text", "reach", "behind"])
def _tile_attention_bwd_dkv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, slope_ptr, begins_ptr, shares_ptr, dk_ptr, dv_ptr, num_tokens,
    stride_qb, stride_kb, stride_vb, stride_q, stride_k, stride_v, softmax_scale, num_frames, per_frame, num_text,
    blocks_per_frame, reach, behind, lse_size,
    STRIDE_Q_HEAD: tl.constexpr, STRIDE_K_HEAD: tl.constexpr, STRIDE_V_HEAD: tl.constexpr, LENGTH: tl.constexpr,
    SLOTS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, num_heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    frame, first, count = locate(tl.program_id(0), num_frames, per_frame, num_text, blocks_per_frame, BLOCK_N)
    columns = first + tl.arange(0, BLOCK_N)
    inside = columns < count
    keys = (frame * per_frame + columns).to(tl.int64)
    q_base = q_ptr + batch * stride_qb + head * STRIDE_Q_HEAD
    k, k_tail = load_rows(k_ptr + batch * stride_kb + head * STRIDE_K_HEAD, keys * stride_k, inside, D, D0, D1)
    v, v_tail = load_rows(v_ptr + batch * stride_vb + head * STRIDE_V_HEAD, keys * stride_v, inside, D, D0, D1)
    dk, dk_tail = zero_rows(BLOCK_N, D0, D1)
    dv, dv_tail = zero_rows(BLOCK_N, D0, D1)
    slots = tl.arange(0, SLOTS)
    scale = softmax_scale * _LOG2_E
    for step in range(0, num_neighbours(frame, num_frames, reach)):
        other = neighbour(frame, step, num_frames, reach, behind)  # of the queries
        begins = tl.load(begins_ptr + other * LENGTH + slots, slots < LENGTH, other=-1)
        shares = tl.load(shares_ptr + other * LENGTH + slots, slots < LENGTH, other=0.0)
        exists = begins >= 0
        shared = shared_slots(slots, exists, other, frame, num_frames, LENGTH)
        if tl.max(shared.to(tl.int32), 0) > 0:
            for start in range(0, tl.where(other == num_frames, num_text, per_frame), BLOCK_M):
                rows = start + tl.arange(0, BLOCK_M)
                within = rows < tl.where(other == num_frames, num_text, per_frame)
                tokens = (other * per_frame + rows).to(tl.int64)
                held = (batch * num_heads + head) * lse_size + begins[None, :] + rows[:, None]
                known = within[:, None] & exists[None, :]
                lse = tl.load(lse_ptr + held, known, other=0.0) * _LOG2_E  # [M, SLOTS]
                slopes = tl.load(slope_ptr + held, known, other=0.0)
                least = least_of(lse, shared)
                alpha, beta = mixed(lse, least, shares[None, :], shared), mixed(lse, least, slopes, shared)
                q, q_tail = load_rows(q_base, tokens * stride_q, within, D, D0, D1)
                place = ((batch * num_tokens + tokens) * num_heads + head) * D
                do, do_tail = load_rows(do_ptr, place, within, D, D0, D1)
                scores = inner_product(k, k_tail, q, q_tail, D1)  # [N, M]
                weights = tl.exp2(tl.fma(scores, scale, -least[None, :]))
                weights = tl.where(inside[:, None] & within[None, :], weights, 0.0)
                dv, dv_tail = accumulate(dv, dv_tail, (weights * alpha[None, :]).to(do.dtype), do, do_tail, D1)
                grads = inner_product(v, v_tail, do, do_tail, D1) * alpha[None, :] - beta[None, :]
                dk, dk_tail = accumulate(dk, dk_tail, (weights * grads).to(q.dtype), q, q_tail, D1)
    place = ((batch * num_tokens + keys) * num_heads + head) * D
    store_rows(dk_ptr, place, dk * softmax_scale, dk_tail * softmax_scale, inside, D, D0, D1)
    store_rows(dv_ptr, place, dv, dv_tail, inside, D, D0, D1)


def tile_attention_backward_refuses(
    grad_0: Tensor, grad_1: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, weights: Tensor, num_frames: int,
    num_text_tokens: int, softmax_scale: float, out_1: Tensor,
) -> Iterator[str]:  # fmt: skip
    yield from tiles_refuse(q, weights)


def tile_attention_backward(
    grad_0: Tensor, grad_1: Tensor, q: Tensor, k: Tensor, v: Tensor, starts: Tensor, weights: Tensor, num_frames: int,
    num_text_tokens: int, softmax_scale: float, out_1: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of tile_attention: q, k, v, weights. grad_0 belongs to o, grad_1 and out_1 to lse."""
    do, dlse, lse = grad_0.contiguous(), grad_1.contiguous(), out_1.contiguous()
    q, k, v = as_tokens(q), as_tokens(k), as_tokens(v)
    # Rows bring the state of all their slots: beside a tile of keys there is room for few of them.
    key_tile, tile = (tile_for(f"tile_attention_bwd_{side}", q, q.shape[3]) for side in ("dkv", "dq"))
    by_row = geometry(q, weights, num_frames, num_text_tokens, tile["BLOCK_M"])
    by_key = geometry(q, weights, num_frames, num_text_tokens, key_tile["BLOCK_N"])
    begins, shares = slot_tables(starts, weights, num_frames, by_row["per_frame"])
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    slopes = torch.empty_like(lse)
    num_parts = q.shape[0] * q.shape[2] * by_row["blocks_per_frame"]
    parts = torch.empty((num_parts, weights.numel()), dtype=torch.float32, device=q.device)
    strides = (q.shape[1], q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1), softmax_scale)
    heads = {"STRIDE_Q_HEAD": q.stride(2), "STRIDE_K_HEAD": k.stride(2), "STRIDE_V_HEAD": v.stride(2)}
    blocks = num_frames * by_row["blocks_per_frame"] + triton.cdiv(num_text_tokens, tile["BLOCK_M"])
    launch(
        _tile_attention_bwd_dq_kernel, (blocks, q.shape[2], q.shape[0]), do, dlse, q, k, v, lse, begins, shares, dq,
        slopes, parts, *strides, num_places=weights.numel(), **heads, **by_row, **tile,
    )  # fmt: skip
    blocks = num_frames * by_key["blocks_per_frame"] + triton.cdiv(num_text_tokens, key_tile["BLOCK_N"])
    launch(
        _tile_attention_bwd_dkv_kernel, (blocks, q.shape[2], q.shape[0]), do, q, k, v, lse, slopes, begins, shares, dk,
        dv, *strides, **heads, **by_key, **key_tile,
    )  # fmt: skip
    return dq, dk, dv, sum_parts(parts, weights.dtype).view(weights.shape)

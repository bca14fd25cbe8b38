"""Attention in overlapping tiles, forward: scores of a pair of frames serve all tiles that hold both.

Pass one multiplies queries by keys and keeps the softmax denominator of every tile of the row; pass two multiplies
once more, and each weight is 2^(score - least denominator) times one coefficient per row and frame, none above one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.lanes import LN_2, LOG2_E, accumulate, inner_product, load_rows, store_rows, zero_rows
from ..common.launch import launch
from ..common.tiles import tile_for
from .slots import geometry, least_of, locate, mixed, neighbour, num_neighbours, shared_slots, slot_tables, tiles_refuse


@triton.jit
def _frame_total(
    q, q_tail, k_base, stride_k, first, num_keys, scale, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Running (maximum, total) of the scores against one frame's keys, in units of log2."""
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, num_keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k, k_tail = load_rows(k_base, (first + columns).to(tl.int64) * stride_k, columns < num_keys, D, D0, D1)
        scores = inner_product(q, q_tail, k, k_tail, D1) * scale
        scores = tl.where((columns < num_keys)[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        peak = higher
    return peak, total


@triton.jit
def _add_frame(
    sums, sums_tail, q, q_tail, k_base, v_base, stride_k, stride_v, first, num_keys, scale, least, share,
    BLOCK_N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """The frame's values, weighted by share 2^(score - least)."""
    for start in range(0, num_keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < num_keys
        tokens = (first + columns).to(tl.int64)
        k, k_tail = load_rows(k_base, tokens * stride_k, inside, D, D0, D1)
        scores = inner_product(q, q_tail, k, k_tail, D1)
        weights = tl.exp2(tl.fma(scores, scale, -least[:, None])) * share[:, None]
        weights = tl.where(inside[None, :], weights, 0.0)
        v, v_tail = load_rows(v_base, tokens * stride_v, inside, D, D0, D1)
        sums, sums_tail = accumulate(sums, sums_tail, weights.to(v.dtype), v, v_tail, D1)
    return sums, sums_tail


@triton.jit(do_not_specialize=["num_frames", "num_text", "reach", "behind"])
def _tile_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, begins_ptr, shares_ptr, num_tokens, stride_qb, stride_kb, stride_vb,
    stride_q, stride_k, stride_v, scale, num_frames, per_frame, num_text, blocks_per_frame, reach, behind, lse_size,
    STRIDE_Q_HEAD: tl.constexpr, STRIDE_K_HEAD: tl.constexpr, STRIDE_V_HEAD: tl.constexpr, LENGTH: tl.constexpr,
    SLOTS: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    head, num_heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    frame, first, count = locate(tl.program_id(0), num_frames, per_frame, num_text, blocks_per_frame, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    within = rows < count
    tokens = (frame * per_frame + rows).to(tl.int64)
    q_base = q_ptr + batch * stride_qb + head * STRIDE_Q_HEAD
    k_base = k_ptr + batch * stride_kb + head * STRIDE_K_HEAD
    v_base = v_ptr + batch * stride_vb + head * STRIDE_V_HEAD
    q, q_tail = load_rows(q_base, tokens * stride_q, within, D, D0, D1)
    slots = tl.arange(0, SLOTS)
    begins = tl.load(begins_ptr + frame * LENGTH + slots, slots < LENGTH, other=-1)
    shares = tl.load(shares_ptr + frame * LENGTH + slots, slots < LENGTH, other=0.0)
    exists = begins >= 0
    # Finite, because -inf less -inf is not a number.
    peaks = tl.full([BLOCK_M, SLOTS], -1.0e30, tl.float32)
    totals = tl.zeros([BLOCK_M, SLOTS], tl.float32)
    for step in range(0, num_neighbours(frame, num_frames, reach)):
        other = neighbour(frame, step, num_frames, reach, behind)
        shared = shared_slots(slots, exists, frame, other, num_frames, LENGTH)
        if tl.max(shared.to(tl.int32), 0) > 0:
            num_keys = tl.where(other == num_frames, num_text, per_frame)
            peak, total = _frame_total(
                q, q_tail, k_base, stride_k, other * per_frame, num_keys, scale, BLOCK_M, BLOCK_N, D, D0, D1
            )
            higher = tl.where(shared[None, :], tl.maximum(peaks, peak[:, None]), peaks)
            added = tl.exp2(tl.where(shared[None, :], peak[:, None] - higher, float("-inf")))
            totals = totals * tl.exp2(peaks - higher) + total[:, None] * added
            peaks = higher
    lse = peaks + tl.log2(tl.where(exists[None, :], totals, 1.0))  # [M, SLOTS]; unused slots are never read
    place = (batch * num_heads + head) * lse_size + begins[None, :] + rows[:, None]
    tl.store(lse_ptr + place, lse * LN_2, within[:, None] & exists[None, :])
    sums, sums_tail = zero_rows(BLOCK_M, D0, D1)
    for step in range(0, num_neighbours(frame, num_frames, reach)):
        other = neighbour(frame, step, num_frames, reach, behind)
        shared = shared_slots(slots, exists, frame, other, num_frames, LENGTH)
        if tl.max(shared.to(tl.int32), 0) > 0:
            num_keys = tl.where(other == num_frames, num_text, per_frame)
            least = least_of(lse, shared)
            share = mixed(lse, least, shares[None, :], shared)
            sums, sums_tail = _add_frame(
                sums, sums_tail, q, q_tail, k_base, v_base, stride_k, stride_v, other * per_frame, num_keys, scale,
                least, share, BLOCK_N, D, D0, D1,
            )  # fmt: skip
    place = ((batch * num_tokens + tokens) * num_heads + head) * D
    store_rows(o_ptr, place, sums, sums_tail, within, D, D0, D1)


def tile_attention_refuses(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, weights: Tensor, num_frames: int, num_text_tokens: int,
    softmax_scale: float,
) -> Iterator[str]:  # fmt: skip
    yield from tiles_refuse(q, weights)


def as_tokens(x: Tensor) -> Tensor:
    """`x` [B, S, H, D] with elements of a head adjacent; a copy only where they are not."""
    return x if x.stride(3) == 1 else x.contiguous()


def tile_attention(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, weights: Tensor, num_frames: int, num_text_tokens: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See kvkeye.ops.tile_attention."""
    q, k, v = as_tokens(q), as_tokens(k), as_tokens(v)
    tile = tile_for("tile_attention_fwd", q, q.shape[3])
    sizes = geometry(q, weights, num_frames, num_text_tokens, tile["BLOCK_M"])
    o = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[0], q.shape[2], sizes["lse_size"]), dtype=torch.float32, device=q.device)
    begins, shares = slot_tables(starts, weights, num_frames, sizes["per_frame"])
    blocks = num_frames * sizes["blocks_per_frame"] + triton.cdiv(num_text_tokens, tile["BLOCK_M"])
    launch(
        _tile_attention_fwd_kernel, (blocks, q.shape[2], q.shape[0]), q, k, v, o, lse, begins, shares, q.shape[1],
        q.stride(0), k.stride(0), v.stride(0), q.stride(1), k.stride(1), v.stride(1), softmax_scale * LOG2_E,
        STRIDE_Q_HEAD=q.stride(2), STRIDE_K_HEAD=k.stride(2), STRIDE_V_HEAD=v.stride(2), **sizes, **tile,
    )  # fmt: skip
    return o, lse

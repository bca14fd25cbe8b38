"""Attention over a paged cache: decode, chunked prefill and draft trees by one kernel with one order of sums.

The rows of a program are (token, query head of one KV head) pairs, 64 of them (32 in fp32). Keys come in tiles of as
many positions, and every 512 positions the running softmax starts anew: a split. Splits are merged in ascending
order, either by the program that computed them all (many rows) or by a second kernel (few rows, splits side by
side). Tile and split bounds are absolute positions and both merges are the same formula, so a row's bits depend on
its own keys only.
"""

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

_SPLIT = 512
#: Programs wanted on the device; splits go side by side until there are this many.
_WANTED_PROGRAMS = 512
#: Rows times splits whose partial sums may be stored: 128 MiB at D = 128.
_MAX_PARTIAL_ROWS = 1 << 18


@triton.jit
def _rows_of_tile(
    cu_seqlens_ptr, context_lens_ptr, num_sequences, num_steps,
    HAS_TREE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(sequence, first token, row index in the sequence [M], mask [M], old tokens, end of the positions seen)."""
    sequence, tile = find_tile(tl.program_id(0), cu_seqlens_ptr, num_sequences, num_steps, GROUP, BLOCK_M)
    begin = tl.load(cu_seqlens_ptr + sequence)
    num_rows = tl.load(cu_seqlens_ptr + sequence + 1) - begin
    context = tl.load(context_lens_ptr + sequence)
    pairs = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    end = context
    if not HAS_TREE:
        rows = tl.minimum(num_rows, ((tile + 1) * BLOCK_M - 1) // GROUP + 1)
        end = tl.maximum(context - num_rows + rows, 0)
    # The room left for a partly filled tile may be empty.
    end = tl.where(tile * BLOCK_M < num_rows * GROUP, end, 0)
    return sequence, begin.to(tl.int64), pairs, pairs < num_rows * GROUP, context - num_rows, end


@triton.jit
def _attend_split(
    q, q_tail, k_ptr, v_ptr, table_ptr, own, bits, old, first, end, scale, stride_k_block, stride_v_block,
    STRIDE_K_SLOT: tl.constexpr, STRIDE_V_SLOT: tl.constexpr, BLOCK_SIZE: tl.constexpr, HAS_TREE: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Online softmax over positions [first, end): (sums, tail, peak in log2, total). own, bits [M]."""
    sums, sums_tail = zero_rows(BLOCK_M, D0, D1)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, end, BLOCK_N):
        positions = start + tl.arange(0, BLOCK_N)
        inside = positions < end
        block = tl.load(table_ptr + positions // BLOCK_SIZE, inside, other=0).to(tl.int64)
        slot = positions % BLOCK_SIZE
        k, k_tail = load_rows(k_ptr, block * stride_k_block + slot * STRIDE_K_SLOT, inside, D, D0, D1)
        scores = inner_product(q, q_tail, k, k_tail, D1)
        if HAS_TREE:
            row = positions - old
            bit = (bits[:, None] >> tl.maximum(row, 0).to(tl.int64)[None, :]) & 1
            seen = inside[None, :] & ((row < 0)[None, :] | (bit == 1))
        else:
            seen = inside[None, :] & (positions[None, :] <= own[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        # A row that has seen nothing keeps exp2(-inf - 0) = 0 instead of exp2(-inf + inf) = NaN.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(tl.fma(scores, scale, -safe[:, None]))
        decay = tl.exp2(peak - safe)
        total = tl.fma(total, decay, tl.sum(weights, 1))
        v, v_tail = load_rows(v_ptr, block * stride_v_block + slot * STRIDE_V_SLOT, inside, D, D0, D1)
        sums, sums_tail = sums * decay[:, None], sums_tail * decay[:, None]
        sums, sums_tail = accumulate(sums, sums_tail, weights.to(v.dtype), v, v_tail, D1)
        peak = higher
    return sums, sums_tail, peak, total


@triton.jit
def _merge_split(sums, sums_tail, peak, total, more, more_tail, more_peak, more_total):
    """Adds one split to the running state. Explicit fma: both callers must round alike."""
    higher = tl.maximum(peak, more_peak)
    safe = tl.where(higher == float("-inf"), 0.0, higher)
    keep, take = tl.exp2(peak - safe), tl.exp2(more_peak - safe)
    total = tl.fma(total, keep, more_total * take)
    sums = tl.fma(sums, keep[:, None], more * take[:, None])
    sums_tail = tl.fma(sums_tail, keep[:, None], more_tail * take[:, None])
    return sums, sums_tail, higher, total


@triton.jit
def _store_state(
    o_ptr, lse_ptr, place, mask, sums, sums_tail, peak, total, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr
):
    """o = sums / total and lse; a row that saw nothing gives 0 and -inf."""
    safe = tl.where(total == 0.0, 1.0, total)
    store_rows(o_ptr, place * D, sums / safe[:, None], sums_tail / safe[:, None], mask, D, D0, D1)
    tl.store(lse_ptr + place, tl.where(total == 0.0, float("-inf"), (peak + tl.log2(safe)) * LN_2), mask)


@triton.jit
def _paged_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, cu_seqlens_ptr, context_lens_ptr, tree_mask_ptr, o_ptr, lse_ptr, parts_ptr,
    part_states_ptr, num_sequences, num_steps, num_pairs, scale, stride_q, stride_table,
    stride_k_block, stride_k_head, stride_v_block, stride_v_head,
    STRIDE_Q_HEAD: tl.constexpr, STRIDE_K_SLOT: tl.constexpr, STRIDE_V_SLOT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, HAS_TREE: tl.constexpr, IS_PART: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    sequence, begin, pairs, mask, old, end = _rows_of_tile(
        cu_seqlens_ptr, context_lens_ptr, num_sequences, num_steps, HAS_TREE, GROUP, BLOCK_M
    )
    token, head = begin + pairs // GROUP, kv_head * GROUP + pairs % GROUP
    place = token * (num_kv_heads * GROUP) + head
    q, q_tail = load_rows(q_ptr, token * stride_q + head * STRIDE_Q_HEAD, mask, D, D0, D1)
    own = old + pairs // GROUP
    bits = own
    if HAS_TREE:
        bits = tl.load(tree_mask_ptr + token, mask, other=0)
    k_base = k_ptr + kv_head.to(tl.int64) * stride_k_head
    v_base = v_ptr + kv_head.to(tl.int64) * stride_v_head
    table = table_ptr + sequence.to(tl.int64) * stride_table
    sums, sums_tail = zero_rows(BLOCK_M, D0, D1)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for split in range(tl.program_id(2), tl.cdiv(end, SPLIT), tl.num_programs(2)):
        more, more_tail, more_peak, more_total = _attend_split(
            q, q_tail, k_base, v_base, table, own, bits, old, split * SPLIT, tl.minimum(end, (split + 1) * SPLIT),
            scale, stride_k_block, stride_v_block, STRIDE_K_SLOT, STRIDE_V_SLOT, BLOCK_SIZE, HAS_TREE,
            D, D0, D1, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if IS_PART:
            part = split * num_pairs.to(tl.int64) + place
            store_rows(parts_ptr, part * D, more, more_tail, mask, D, D0, D1)
            tl.store(part_states_ptr + part * 2, more_peak, mask)
            tl.store(part_states_ptr + part * 2 + 1, more_total, mask)
        else:
            sums, sums_tail, peak, total = _merge_split(
                sums, sums_tail, peak, total, more, more_tail, more_peak, more_total
            )
    if not IS_PART:
        _store_state(o_ptr, lse_ptr, place, mask, sums, sums_tail, peak, total, D, D0, D1)


@triton.jit
def _paged_attention_merge_kernel(
    cu_seqlens_ptr, context_lens_ptr, o_ptr, lse_ptr, parts_ptr, part_states_ptr, num_sequences, num_steps, num_pairs,
    GROUP: tl.constexpr, HAS_TREE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    kv_head, num_kv_heads = tl.program_id(1), tl.num_programs(1)
    _, begin, pairs, mask, _, end = _rows_of_tile(
        cu_seqlens_ptr, context_lens_ptr, num_sequences, num_steps, HAS_TREE, GROUP, BLOCK_M
    )
    place = (begin + pairs // GROUP) * (num_kv_heads * GROUP) + kv_head * GROUP + pairs % GROUP
    sums, sums_tail = zero_rows(BLOCK_M, D0, D1)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for split in range(0, tl.cdiv(end, SPLIT)):
        part = split * num_pairs.to(tl.int64) + place
        more, more_tail = load_rows(parts_ptr, part * D, mask, D, D0, D1)
        more_peak = tl.load(part_states_ptr + part * 2, mask, other=float("-inf"))
        more_total = tl.load(part_states_ptr + part * 2 + 1, mask, other=0.0)
        sums, sums_tail, peak, total = _merge_split(
            sums, sums_tail, peak, total, more, more_tail, more_peak, more_total
        )
    _store_state(o_ptr, lse_ptr, place, mask, sums, sums_tail, peak, total, D, D0, D1)


def paged_attention_refuses(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    tree_mask: Tensor | None, softmax_scale: float, k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> Iterator[str]:  # fmt: skip
    yield from attention_refuses(q, context_lens.shape[0], softmax_scale)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.stride(3) != 1:
            yield f"{name}.stride(3) is {cache.stride(3)}; a slot's elements must be adjacent"


def split_workers(num_programs: int, num_splits: int, num_pairs: int) -> int:
    """How many programs share the splits of one tile of rows: 1 where there are rows enough, or no room for parts.

    The answer changes the speed, never the bits.
    """
    if num_splits * num_pairs > _MAX_PARTIAL_ROWS:
        return 1
    return max(1, min(num_splits, triton.cdiv(_WANTED_PROGRAMS, max(num_programs, 1))))


def paged_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor, cu_seqlens_q: Tensor, context_lens: Tensor,
    tree_mask: Tensor | None, softmax_scale: float, k_scales: Tensor | None = None, v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See kvkeye.ops.paged_attention; caches with scales are refused by their dtype."""
    q, (num_tokens, num_q_heads, head_dim) = as_heads(q), q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    num_sequences, group, device = context_lens.shape[0], num_q_heads // num_kv_heads, q.device
    o = torch.empty(q.shape, dtype=q.dtype, device=device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=device)
    # The same for 1 row and for 4096: where rows are few, the keys' way from memory is the limit, not the idle rows.
    tile = tile_for("paged_attention_fwd", q, head_dim)
    num_tiles = num_tokens * group // tile["BLOCK_M"] + num_sequences if num_tokens else 0
    num_splits = triton.cdiv(block_table.shape[1] * block_size, _SPLIT)
    num_pairs = num_tokens * num_q_heads
    workers = split_workers(num_tiles * num_kv_heads, num_splits, num_pairs)
    is_part = workers > 1
    parts = torch.empty((num_splits, num_pairs, head_dim) if is_part else 1, dtype=torch.float32, device=device)
    states = torch.empty((num_splits, num_pairs, 2) if is_part else 1, dtype=torch.float32, device=device)
    shared = {"GROUP": group, "HAS_TREE": tree_mask is not None, "SPLIT": _SPLIT, **lane_constants(head_dim)}
    bounds, lengths = cu_seqlens_q.contiguous(), context_lens.contiguous()
    table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    bisection = (num_sequences, num_sequences.bit_length(), num_pairs)
    launch(
        _paged_attention_fwd_kernel, (num_tiles, num_kv_heads, workers), q, k_cache, v_cache, table, bounds, lengths,
        lengths if tree_mask is None else tree_mask.contiguous(), o, lse, parts, states, *bisection,
        softmax_scale * LOG2_E, q.stride(0), table.stride(0), *k_cache.stride()[:2], *v_cache.stride()[:2],
        STRIDE_Q_HEAD=q.stride(1), STRIDE_K_SLOT=k_cache.stride(2), STRIDE_V_SLOT=v_cache.stride(2),
        BLOCK_SIZE=block_size, IS_PART=is_part, **shared, **tile,
    )  # fmt: skip
    if is_part:
        launch(
            _paged_attention_merge_kernel, (num_tiles, num_kv_heads), bounds, lengths, o, lse, parts, states,
            *bisection, BLOCK_M=tile["BLOCK_M"], num_warps=8, **shared,
        )  # fmt: skip
    return o, lse

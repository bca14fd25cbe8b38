"""Merging of attention states over disjoint sets of keys: one row of D lanes per (token, head)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import lanes_for, launch, warps_for
from ..common.refusals import interpreted_bf16, too_wide

_MAX_HEAD_DIM = 4096


@triton.jit
def _shares(lse_a, lse_b):
    """(weight of a, weight of b, lse) of the union; two empty sets weigh nothing."""
    peak = tl.maximum(lse_a, lse_b)
    # Two empty sets: exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    a, b = tl.exp(lse_a - peak), tl.exp(lse_b - peak)
    total = a + b
    safe = tl.where(total == 0.0, 1.0, total)
    return a / safe, b / safe, tl.where(total == 0.0, float("-inf"), tl.log(safe) + peak)


@triton.jit
def _merge_attention_states_fwd_kernel(
    o_a_ptr, lse_a_ptr, o_b_ptr, lse_b_ptr, o_ptr, lse_ptr, num_rows,
    D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)[None, :]
    mask = (rows < num_rows)[:, None] & (lanes < D)
    lse_a = tl.load(lse_a_ptr + rows, rows < num_rows, other=0.0).to(tl.float32)
    lse_b = tl.load(lse_b_ptr + rows, rows < num_rows, other=0.0).to(tl.float32)
    a, b, lse = _shares(lse_a, lse_b)
    place = rows[:, None] * D + lanes
    o_a = tl.load(o_a_ptr + place, mask, other=0.0).to(tl.float32)
    o_b = tl.load(o_b_ptr + place, mask, other=0.0).to(tl.float32)
    tl.store(o_ptr + place, a[:, None] * o_a + b[:, None] * o_b, mask)
    tl.store(lse_ptr + rows, lse, rows < num_rows)


@triton.jit
def _merge_attention_states_bwd_kernel(
    do_ptr, dlse_ptr, o_a_ptr, lse_a_ptr, o_b_ptr, lse_b_ptr, do_a_ptr, dlse_a_ptr, do_b_ptr, dlse_b_ptr, num_rows,
    D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    lanes = tl.arange(0, LANES)[None, :]
    within = rows < num_rows
    mask = within[:, None] & (lanes < D)
    lse_a = tl.load(lse_a_ptr + rows, within, other=0.0).to(tl.float32)
    lse_b = tl.load(lse_b_ptr + rows, within, other=0.0).to(tl.float32)
    a, b, _ = _shares(lse_a, lse_b)
    place = rows[:, None] * D + lanes
    do = tl.load(do_ptr + place, mask, other=0.0).to(tl.float32)
    o_a = tl.load(o_a_ptr + place, mask, other=0.0).to(tl.float32)
    o_b = tl.load(o_b_ptr + place, mask, other=0.0).to(tl.float32)
    dlse = tl.load(dlse_ptr + rows, within, other=0.0).to(tl.float32)
    # d(weight of a) / d(lse_a) = a b, and its negative for lse_b.
    exchange = a * b * tl.sum(do * (o_a - o_b), 1)
    tl.store(do_a_ptr + place, a[:, None] * do, mask)
    tl.store(do_b_ptr + place, b[:, None] * do, mask)
    tl.store(dlse_a_ptr + rows, exchange + a * dlse, within)
    tl.store(dlse_b_ptr + rows, b * dlse - exchange, within)


def _tile(head_dim: int) -> dict[str, int]:
    lanes = lanes_for(head_dim)
    rows = max(1, min(16, 2048 // lanes))
    return {"D": head_dim, "ROWS": rows, "LANES": lanes, "num_warps": warps_for(2 * rows * lanes)}


def merge_attention_states_refuses(o_a: Tensor, *rest: object) -> Iterator[str]:
    yield from interpreted_bf16(o_a)
    yield from too_wide(o_a.shape[-1], _MAX_HEAD_DIM)


def merge_attention_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """See kvkeye.ops.merge_attention_states."""
    o = torch.empty(o_a.shape, dtype=o_a.dtype, device=o_a.device)
    lse = torch.empty(lse_a.shape, dtype=torch.float32, device=o_a.device)
    tile = _tile(o_a.shape[2])
    launch(
        _merge_attention_states_fwd_kernel, (triton.cdiv(lse.numel(), tile["ROWS"]),), o_a.contiguous(),
        lse_a.contiguous(), o_b.contiguous(), lse_b.contiguous(), o, lse, lse.numel(), **tile,
    )  # fmt: skip
    return o, lse


def merge_attention_states_backward_refuses(grad_0: Tensor, *rest: object) -> Iterator[str]:
    yield from merge_attention_states_refuses(grad_0)


def merge_attention_states_backward(
    grad_0: Tensor, grad_1: Tensor, o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of merge_attention_states: o_a, lse_a, o_b, lse_b. grad_0 belongs to o, grad_1 to lse."""
    inputs = [t.contiguous() for t in (grad_0, grad_1, o_a, lse_a, o_b, lse_b)]
    outputs = tuple(torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (o_a, lse_a, o_b, lse_b))
    tile = _tile(o_a.shape[2])
    launch(
        _merge_attention_states_bwd_kernel, (triton.cdiv(lse_a.numel(), tile["ROWS"]),), *inputs, *outputs,
        lse_a.numel(), **tile,
    )  # fmt: skip
    return outputs[0], outputs[1], outputs[2], outputs[3]

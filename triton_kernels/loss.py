"""Log-probabilities of chosen tokens: one program per row, the vocabulary in tiles, nothing of size [T, V] stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import as_rows, lanes_for, launch
from .common.refusals import interpreted_bf16

_BLOCK = 4096


@triton.jit
def _row_lse(row_ptr, width, BLOCK: tl.constexpr):
    """log sum exp of one row; every lane keeps its own running maximum and sum."""
    lanes = tl.arange(0, BLOCK)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, width, BLOCK):
        x = tl.load(row_ptr + first + lanes, first + lanes < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, x)
        # A lane that has seen only -inf keeps exp(-inf - 0) = 0 instead of exp(-inf + inf) = NaN.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(peak - safe) + tl.exp(x - safe)
        peak = higher
    highest = tl.max(peak, 0)
    safe = tl.where(highest == float("-inf"), 0.0, highest)
    return tl.log(tl.sum(total * tl.exp(peak - safe), 0)) + safe


@triton.jit
def _token_logprobs_fwd_kernel(
    logits_ptr, targets_ptr, out_ptr, stride_logits, stride_target, width, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    chosen = tl.load(row_ptr + tl.load(targets_ptr + row * stride_target)).to(tl.float32)
    tl.store(out_ptr + row, chosen - _row_lse(row_ptr, width, BLOCK))


@triton.jit
def _token_logprobs_bwd_kernel(
    grad_ptr, logits_ptr, targets_ptr, dlogits_ptr, stride_grad, stride_logits, stride_target, width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits
    target = tl.load(targets_ptr + row * stride_target)
    grad = tl.load(grad_ptr + row * stride_grad).to(tl.float32)
    lse = _row_lse(row_ptr, width, BLOCK)
    lanes = tl.arange(0, BLOCK)
    for first in range(0, width, BLOCK):
        mask = first + lanes < width
        x = tl.load(row_ptr + first + lanes, mask, other=float("-inf")).to(tl.float32)
        hit = tl.where(first + lanes == target, 1.0, 0.0)
        tl.store(dlogits_ptr + row * width + first + lanes, grad * (hit - tl.exp(x - lse)), mask)


token_logprobs_refuses = interpreted_bf16


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """See kvkeye.ops.token_logprobs."""
    rows, width = as_rows(logits), logits.shape[1]
    out = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    launch(
        _token_logprobs_fwd_kernel, (targets.shape[0],), rows, targets, out, rows.stride(0), targets.stride(0), width,
        BLOCK=min(_BLOCK, lanes_for(width)), num_warps=8,
    )  # fmt: skip
    return out


token_logprobs_backward_refuses = interpreted_bf16


def token_logprobs_backward(grad: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    """Gradient of token_logprobs: logits. The softmax is computed again, not stored."""
    rows, width = as_rows(logits), logits.shape[1]
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch(
        _token_logprobs_bwd_kernel, (targets.shape[0],), grad, rows, targets, dlogits, grad.stride(0), rows.stride(0),
        targets.stride(0), width, BLOCK=min(_BLOCK, lanes_for(width)), num_warps=8,
    )  # fmt: skip
    return dlogits

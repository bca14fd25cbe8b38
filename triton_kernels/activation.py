"""Activations: one pass over memory, arithmetic in fp32."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import as_rows, lanes_for, launch, warps_for
from .common.refusals import interpreted_bf16

_BLOCK = 1024
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_TWO_SQRT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)
_RSQRT_TWO_PI = tl.constexpr(0.3989422804014327)
_CUBIC = tl.constexpr(0.044715)
_THREE_CUBIC = tl.constexpr(0.134145)


@triton.jit
def _silu_mul_fwd_kernel(x_ptr, y_ptr, stride_x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x_ptr + row * stride_x + lanes, lanes < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + WIDTH + lanes, lanes < WIDTH, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * WIDTH + lanes, gate * tl.sigmoid(gate) * up, lanes < WIDTH)


@triton.jit
def _silu_mul_bwd_kernel(grad_ptr, x_ptr, dx_ptr, stride_grad, stride_x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < WIDTH
    gate = tl.load(x_ptr + row * stride_x + lanes, mask, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * stride_x + WIDTH + lanes, mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * stride_grad + lanes, mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = grad * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(dx_ptr + row * 2 * WIDTH + lanes, dgate, mask)
    tl.store(dx_ptr + row * 2 * WIDTH + WIDTH + lanes, grad * gate * sigmoid, mask)


def _columns(width: int) -> tuple[int, dict[str, int]]:
    """Programs per row, and their constants."""
    block = min(_BLOCK, lanes_for(width))
    return triton.cdiv(width, block), {"WIDTH": width, "BLOCK": block, "num_warps": warps_for(4 * block)}


silu_mul_refuses = interpreted_bf16


def silu_mul(gate_up: Tensor) -> Tensor:
    """See kvkeye.ops.silu_mul."""
    rows, width = as_rows(gate_up), gate_up.shape[-1] // 2
    y = torch.empty((*gate_up.shape[:-1], width), dtype=gate_up.dtype, device=gate_up.device)
    columns, constants = _columns(width)
    launch(_silu_mul_fwd_kernel, (rows.shape[0], columns), rows, y, rows.stride(0), **constants)
    return y


silu_mul_backward_refuses = interpreted_bf16


def silu_mul_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of silu_mul: gate_up."""
    rows, grads = as_rows(gate_up), as_rows(grad)
    dx = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    columns, constants = _columns(gate_up.shape[-1] // 2)
    launch(
        _silu_mul_bwd_kernel, (rows.shape[0], columns), grads, rows, dx, grads.stride(0), rows.stride(0), **constants
    )
    return dx


@triton.jit
def _gelu_fwd_kernel(x_ptr, y_ptr, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, place < count, other=0.0).to(tl.float32)
    if TANH:
        # (1 + tanh u) / 2 is sigmoid(2 u), which does not cancel for negative u.
        y = x * tl.sigmoid((x + x * x * x * _CUBIC) * _TWO_SQRT_TWO_OVER_PI)
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * _SQRT_HALF))
    tl.store(y_ptr + place, y, place < count)


@triton.jit
def _gelu_bwd_kernel(grad_ptr, x_ptr, dx_ptr, count, TANH: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, place < count, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + place, place < count, other=0.0).to(tl.float32)
    if TANH:
        sigmoid = tl.sigmoid((x + x * x * x * _CUBIC) * _TWO_SQRT_TWO_OVER_PI)
        inner = (1.0 + x * x * _THREE_CUBIC) * _TWO_SQRT_TWO_OVER_PI
        slope = sigmoid + x * sigmoid * (1.0 - sigmoid) * inner
    else:
        slope = 0.5 * (1.0 + tl.erf(x * _SQRT_HALF)) + x * _RSQRT_TWO_PI * tl.exp(-0.5 * x * x)
    tl.store(dx_ptr + place, grad * slope, place < count)


gelu_refuses = interpreted_bf16


def gelu(x: Tensor, tanh: bool) -> Tensor:
    """See kvkeye.ops.gelu."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(x.numel(), _BLOCK),)
    launch(_gelu_fwd_kernel, grid, x.contiguous(), y, x.numel(), TANH=tanh, BLOCK=_BLOCK, num_warps=4)
    return y


gelu_backward_refuses = interpreted_bf16


def gelu_backward(grad: Tensor, x: Tensor, tanh: bool) -> Tensor:
    """Gradient of gelu: x."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch(
        _gelu_bwd_kernel, (triton.cdiv(x.numel(), _BLOCK),), grad.contiguous(), x.contiguous(), dx, x.numel(),
        TANH=tanh, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    return dx

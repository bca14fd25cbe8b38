"""Normalisation. Forward: a tile of rows per program. Backward: rows in strides, weight gradients by parts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import as_rows, lanes_for, launch, warps_for
from .common.refusals import interpreted_bf16, too_wide
from .common.sums import MAX_PARTS, sum_parts

_MAX_WIDTH = 32768


def _tile(width: int) -> dict[str, int]:
    """Constants of a tile of rows: about 2048 elements."""
    lanes = lanes_for(width)
    rows = max(1, min(16, 2048 // lanes))
    return {"D": width, "ROWS": rows, "LANES": lanes, "num_warps": warps_for(2 * rows * lanes)}


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, total_ptr, num_rows, stride_x, stride_residual, eps,
    HAS_RESIDUAL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    lanes = tl.arange(0, LANES)[None, :]  # [1, LANES]
    mask = (rows < num_rows) & (lanes < D)
    x = tl.load(x_ptr + rows * stride_x + lanes, mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * stride_residual + lanes, mask, other=0.0)
        # Rounded before it is normalised, as two separate ops would.
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + rows * D + lanes, x, mask)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, 1) / D + eps)[:, None]
    weight = tl.load(weight_ptr + lanes, lanes < D, other=0.0).to(tl.float32)
    normed = (wide * scale).to(x.dtype).to(tl.float32)
    tl.store(y_ptr + rows * D + lanes, normed * weight, mask)


@triton.jit
def _rms_norm_bwd_kernel(
    grad_ptr, grad_total_ptr, x_ptr, residual_ptr, weight_ptr, dx_ptr, dresidual_ptr, parts_ptr,
    num_rows, stride_grad, stride_grad_total, stride_x, stride_residual, eps,
    HAS_RESIDUAL: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, LANES)[None, :]
    weight = tl.load(weight_ptr + lanes, lanes < D, other=0.0).to(tl.float32)
    part = tl.zeros([LANES], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mask = (rows < num_rows) & (lanes < D)
        x = tl.load(x_ptr + rows * stride_x + lanes, mask, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            x += tl.load(residual_ptr + rows * stride_residual + lanes, mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
        grad = tl.load(grad_ptr + rows * stride_grad + lanes, mask, other=0.0).to(tl.float32)
        normed = x * scale
        part += tl.sum(grad * normed, 0)
        slope = grad * weight
        dx = scale * (slope - normed * (tl.sum(slope * normed, 1)[:, None] / D))
        if HAS_RESIDUAL:
            dx += tl.load(grad_total_ptr + rows * stride_grad_total + lanes, mask, other=0.0).to(tl.float32)
            tl.store(dresidual_ptr + rows * D + lanes, dx, mask)
        tl.store(dx_ptr + rows * D + lanes, dx, mask)
    tl.store(parts_ptr + tl.program_id(0) * D + lanes, part[None, :], lanes < D)


def rms_norm_refuses(x: Tensor, *rest: object) -> Iterator[str]:
    yield from interpreted_bf16(x)
    yield from too_wide(x.shape[-1], _MAX_WIDTH)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See kvkeye.ops.rms_norm."""
    rows, y = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile(x.shape[-1])
    launch(
        _rms_norm_fwd_kernel, (triton.cdiv(rows.shape[0], tile["ROWS"]),),
        rows, rows, weight.contiguous(), y, y, rows.shape[0], rows.stride(0), 0, eps, HAS_RESIDUAL=False, **tile,
    )  # fmt: skip
    return y


add_rms_norm_refuses = rms_norm_refuses


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See kvkeye.ops.add_rms_norm."""
    rows, others = as_rows(x), as_rows(residual)
    y, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    tile = _tile(x.shape[-1])
    launch(
        _rms_norm_fwd_kernel, (triton.cdiv(rows.shape[0], tile["ROWS"]),), rows, others, weight.contiguous(),
        y, total, rows.shape[0], rows.stride(0), others.stride(0), eps, HAS_RESIDUAL=True, **tile,
    )  # fmt: skip
    return y, total


def _rms_norm_backward(
    grad: Tensor, grad_total: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dresidual, dweight); dresidual is dx itself where there is no residual."""
    rows, grads = as_rows(x), as_rows(grad)
    others = rows if residual is None else as_rows(residual)
    others_grads = grads if grad_total is None else as_rows(grad_total)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dresidual = dx if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile(x.shape[-1])
    num_parts = min(triton.cdiv(rows.shape[0], tile["ROWS"]), MAX_PARTS)
    parts = torch.empty((num_parts, x.shape[-1]), dtype=torch.float32, device=x.device)
    launch(
        _rms_norm_bwd_kernel, (num_parts,), grads, others_grads, rows, others, weight.contiguous(), dx, dresidual,
        parts, rows.shape[0], grads.stride(0), others_grads.stride(0), rows.stride(0), others.stride(0), eps,
        HAS_RESIDUAL=residual is not None, **tile,
    )  # fmt: skip
    return dx, dresidual, sum_parts(parts, weight.dtype)


rms_norm_backward_refuses = rms_norm_refuses


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of rms_norm: x, weight."""
    dx, _, dweight = _rms_norm_backward(grad, None, x, None, weight, eps)
    return dx, dweight


add_rms_norm_backward_refuses = rms_norm_refuses


def add_rms_norm_backward(
    grad_0: Tensor, grad_1: Tensor, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of add_rms_norm: x, residual, weight. grad_0 belongs to y, grad_1 to the new residual."""
    return _rms_norm_backward(grad_0, grad_1, x, residual, weight, eps)


@triton.jit
def _layer_norm_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, num_rows, stride_x, eps,
    D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    lanes = tl.arange(0, LANES)[None, :]
    mask = (rows < num_rows) & (lanes < D)
    x = tl.load(x_ptr + rows * stride_x + lanes, mask, other=0.0).to(tl.float32)
    # The padding lanes must not count in the variance.
    centred = tl.where(mask, x - tl.sum(x, 1)[:, None] / D, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
    weight = tl.load(weight_ptr + lanes, lanes < D, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + lanes, lanes < D, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows * D + lanes, centred * scale * weight + bias, mask)


@triton.jit
def _layer_norm_bwd_kernel(
    grad_ptr, x_ptr, weight_ptr, dx_ptr, weight_parts_ptr, bias_parts_ptr, num_rows, stride_grad, stride_x, eps,
    D: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, LANES)[None, :]
    weight = tl.load(weight_ptr + lanes, lanes < D, other=0.0).to(tl.float32)
    weight_part = tl.zeros([LANES], tl.float32)
    bias_part = tl.zeros([LANES], tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = tile * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
        mask = (rows < num_rows) & (lanes < D)
        x = tl.load(x_ptr + rows * stride_x + lanes, mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - tl.sum(x, 1)[:, None] / D, 0.0)
        scale = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)[:, None]
        grad = tl.load(grad_ptr + rows * stride_grad + lanes, mask, other=0.0).to(tl.float32)
        normed = centred * scale
        weight_part += tl.sum(grad * normed, 0)
        bias_part += tl.sum(grad, 0)
        slope = grad * weight
        along = tl.sum(slope * normed, 1)[:, None] / D
        dx = scale * (slope - tl.sum(slope, 1)[:, None] / D - normed * along)
        tl.store(dx_ptr + rows * D + lanes, dx, mask)
    tl.store(weight_parts_ptr + tl.program_id(0) * D + lanes, weight_part[None, :], lanes < D)
    tl.store(bias_parts_ptr + tl.program_id(0) * D + lanes, bias_part[None, :], lanes < D)


layer_norm_refuses = rms_norm_refuses


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See kvkeye.ops.layer_norm."""
    rows, y = as_rows(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile(x.shape[-1])
    launch(
        _layer_norm_fwd_kernel, (triton.cdiv(rows.shape[0], tile["ROWS"]),),
        rows, weight.contiguous(), bias.contiguous(), y, rows.shape[0], rows.stride(0), eps, **tile,
    )  # fmt: skip
    return y


layer_norm_backward_refuses = rms_norm_refuses


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of layer_norm: x, weight, bias."""
    rows, grads = as_rows(x), as_rows(grad)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = _tile(x.shape[-1])
    num_parts = min(triton.cdiv(rows.shape[0], tile["ROWS"]), MAX_PARTS)
    parts = torch.empty((2, num_parts, x.shape[-1]), dtype=torch.float32, device=x.device)
    launch(
        _layer_norm_bwd_kernel, (num_parts,), grads, rows, weight.contiguous(), dx, parts[0], parts[1],
        rows.shape[0], grads.stride(0), rows.stride(0), eps, **tile,
    )  # fmt: skip
    return dx, sum_parts(parts[0], weight.dtype), sum_parts(parts[1], bias.dtype)

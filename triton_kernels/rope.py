"""Rotary embeddings: one token and up to 16 heads per program, so that an angle's cosine serves many heads."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import as_heads, as_rows, lanes_for, launch, warps_for
from .common.refusals import interpreted_bf16
from .common.sums import MAX_PARTS, sum_parts

_HEADS = 16


@functools.lru_cache(maxsize=16)
def _frequencies(half: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-i / half), i < half: computed in fp64, rounded to fp32; kept, since a model uses one."""
    exponent = torch.arange(half, device=device, dtype=torch.float64) / half
    return torch.pow(torch.tensor(theta, dtype=torch.float64, device=device), -exponent).float()


def _tile(num_heads: int, half: int) -> tuple[int, dict[str, int]]:
    """Head tiles per token, and the constants of a tile."""
    heads = min(_HEADS, triton.next_power_of_2(num_heads))
    lanes = lanes_for(half)
    constants = {"HALF": half, "HEADS": heads, "LANES": lanes, "num_warps": warps_for(2 * heads * lanes)}
    return triton.cdiv(num_heads, heads), constants


@triton.jit
def _turn_of(angle):
    """cos and sin of any fp32 angle below 2^21, to 1e-7: the multiple of pi / 2 is taken off in two parts of fp64, the
    rest goes to polynomials of Cephes. The library's functions may keep a table in local memory for their far range.
    """
    # Adding 1.5 * 2^52 leaves the nearest integer in the low bits.
    shifted = tl.fma(angle.to(tl.float64), 0.6366197723675813, 6755399441055744.0)
    quarter = shifted.to(tl.int64, bitcast=True)
    quarters = shifted - 6755399441055744.0
    rest = tl.fma(quarters, -1.5707963267948966, angle.to(tl.float64))
    r = tl.fma(quarters, -6.123233995736766e-17, rest).to(tl.float32)
    z = r * r
    s = tl.fma(tl.fma(tl.fma(z, -1.9515295891e-4, 8.3321608736e-3), z, -1.6666654611e-1) * z, r, r)
    c = tl.fma(tl.fma(z, 2.443315711809948e-5, -1.388731625493765e-3), z, 4.166664568298827e-2)
    c = tl.fma(c, z * z, tl.fma(z, -0.5, 1.0))
    swapped = (quarter & 1) != 0
    cos, sin = tl.where(swapped, s, c), tl.where(swapped, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -cos, cos), tl.where((quarter & 2) != 0, -sin, sin)


@triton.jit
def _sectioned_angles(
    positions_ptr, frequencies_ptr, token, stride_axis, stride_token, lanes, S0, S1, HALF: tl.constexpr
):
    """cos and sin [LANES] of one token: frequency i turns by the time, row or column position."""
    axis = tl.where(lanes < S0, 0, tl.where(lanes < S0 + S1, 1, 2))
    position = tl.load(positions_ptr + axis * stride_axis + token * stride_token, lanes < HALF, other=0)
    angle = position.to(tl.float32) * tl.load(frequencies_ptr + lanes, lanes < HALF, other=0.0)
    return _turn_of(angle)


@triton.jit
def _rotate_heads(
    x_ptr, y_ptr, token, num_heads, stride_token, stride_head, cos, sin, lanes,
    HALF: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Split-half rotation of this program's heads of one token. cos, sin [LANES]."""
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    mask = (heads < num_heads) & (lanes < HALF)[None, :]
    source = x_ptr + token * stride_token + heads * stride_head + lanes[None, :]
    first = tl.load(source, mask, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask, other=0.0).to(tl.float32)
    target = y_ptr + (token * num_heads + heads) * 2 * HALF + lanes[None, :]
    tl.store(target, first * cos[None, :] - second * sin[None, :], mask)
    tl.store(target + HALF, second * cos[None, :] + first * sin[None, :], mask)


@triton.jit
def _rope_2d_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, num_heads, stride_token, stride_head, stride_cos, stride_sin,
    INVERSE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    cos = tl.load(cos_ptr + token * stride_cos + lanes, lanes < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * stride_sin + lanes, lanes < HALF, other=0.0)
    if INVERSE:
        sin = -sin
    _rotate_heads(x_ptr, y_ptr, token, num_heads, stride_token, stride_head, cos, sin, lanes, HALF, HEADS)


@triton.jit
def _mrope_kernel(
    x_ptr, positions_ptr, frequencies_ptr, y_ptr, num_heads, stride_token, stride_head, stride_axis, stride_position,
    S0, S1, INVERSE: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, LANES)
    cos, sin = _sectioned_angles(
        positions_ptr, frequencies_ptr, token, stride_axis, stride_position, lanes, S0, S1, HALF
    )
    if INVERSE:
        sin = -sin
    _rotate_heads(x_ptr, y_ptr, token, num_heads, stride_token, stride_head, cos, sin, lanes, HALF, HEADS)


def _rope_2d(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    heads, cos, sin = as_heads(x), as_rows(cos), as_rows(sin)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns, constants = _tile(x.shape[1], x.shape[2] // 2)
    launch(
        _rope_2d_kernel, (x.shape[0], columns), heads, cos, sin, y, x.shape[1], heads.stride(0), heads.stride(1),
        cos.stride(0), sin.stride(0), INVERSE=inverse, **constants,
    )  # fmt: skip
    return y


rope_2d_refuses = interpreted_bf16


def rope_2d(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See kvkeye.ops.rope_2d."""
    return _rope_2d(x, cos, sin, False)


rope_2d_backward_refuses = interpreted_bf16


def rope_2d_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of rope_2d: x, by the inverse rotation."""
    return _rope_2d(grad, cos, sin, True)


def _mrope(x: Tensor, positions: Tensor, sections: list[int], theta: float, inverse: bool) -> Tensor:
    heads, half = as_heads(x), x.shape[2] // 2
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns, constants = _tile(x.shape[1], half)
    launch(
        _mrope_kernel, (x.shape[0], columns), heads, positions, _frequencies(half, theta, x.device), y, x.shape[1],
        heads.stride(0), heads.stride(1), *positions.stride(), sections[0], sections[1], INVERSE=inverse, **constants,
    )  # fmt: skip
    return y


mrope_refuses = interpreted_bf16


def mrope(x: Tensor, positions: Tensor, sections: list[int], theta: float) -> Tensor:
    """See kvkeye.ops.mrope."""
    return _mrope(x, positions, sections, theta, False)


mrope_backward_refuses = interpreted_bf16


def mrope_backward(grad: Tensor, positions: Tensor, sections: list[int], theta: float) -> Tensor:
    """Gradient of mrope: x, by the inverse rotation."""
    return _mrope(grad, positions, sections, theta, True)


@triton.jit
def _head_weights(q_weight_ptr, k_weight_ptr, is_q, lanes, HALF: tl.constexpr):
    """Both halves of each head's weight, fp32 [HEADS, LANES]. is_q [HEADS, 1]."""
    within = (lanes < HALF)[None, :]
    q_weight, k_weight = q_weight_ptr + lanes[None, :], k_weight_ptr + lanes[None, :]
    first = tl.where(is_q, tl.load(q_weight, within, other=0.0), tl.load(k_weight, within, other=0.0))
    q_weight, k_weight = q_weight + HALF, k_weight + HALF
    second = tl.where(is_q, tl.load(q_weight, within, other=0.0), tl.load(k_weight, within, other=0.0))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _qk_norm_mrope_fwd_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, positions_ptr, frequencies_ptr, q_ptr, k_ptr,
    num_q_heads, num_kv_heads, stride_qkv, stride_axis, stride_position, S0, S1, eps,
    HALF: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # queries first, then keys
    lanes = tl.arange(0, LANES)
    is_q = heads < num_q_heads
    within = (lanes < HALF)[None, :]
    mask = (heads < num_q_heads + num_kv_heads) & within
    source = qkv_ptr + token * stride_qkv + heads * 2 * HALF + lanes[None, :]
    first, second = tl.load(source, mask, other=0.0), tl.load(source + HALF, mask, other=0.0)
    first_wide, second_wide = first.to(tl.float32), second.to(tl.float32)
    square = tl.sum(first_wide * first_wide + second_wide * second_wide, 1) / (2 * HALF)
    scale = tl.rsqrt(square + eps)[:, None]
    weight, weight_second = _head_weights(q_weight_ptr, k_weight_ptr, is_q, lanes, HALF)
    # Rounded after the norm and after the weight, as the separate ops would.
    first = ((first_wide * scale).to(first.dtype).to(tl.float32) * weight).to(first.dtype)
    second = ((second_wide * scale).to(second.dtype).to(tl.float32) * weight_second).to(second.dtype)
    cos, sin = _sectioned_angles(
        positions_ptr, frequencies_ptr, token, stride_axis, stride_position, lanes, S0, S1, HALF
    )
    turned = first.to(tl.float32) * cos[None, :] - second.to(tl.float32) * sin[None, :]
    turned_second = second.to(tl.float32) * cos[None, :] + first.to(tl.float32) * sin[None, :]
    q = q_ptr + (token * num_q_heads + heads) * 2 * HALF + lanes[None, :]
    k = k_ptr + (token * num_kv_heads + heads - num_q_heads) * 2 * HALF + lanes[None, :]
    tl.store(q, turned, mask & is_q)
    tl.store(q + HALF, turned_second, mask & is_q)
    tl.store(k, turned, mask & ~is_q)
    tl.store(k + HALF, turned_second, mask & ~is_q)


qk_norm_mrope_refuses = interpreted_bf16


def qk_norm_mrope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor, sections: list[int], theta: float,
    eps: float, num_kv_heads: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See kvkeye.ops.qk_norm_mrope."""
    rows, head_dim, tokens = as_rows(qkv), q_weight.shape[0], qkv.shape[0]
    num_q_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q, k = (
        torch.empty((tokens, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
        for heads in (num_q_heads, num_kv_heads)
    )
    columns, constants = _tile(num_q_heads + num_kv_heads, head_dim // 2)
    launch(
        _qk_norm_mrope_fwd_kernel, (tokens, columns), rows, q_weight.contiguous(), k_weight.contiguous(), positions,
        _frequencies(head_dim // 2, theta, qkv.device), q, k, num_q_heads, num_kv_heads, rows.stride(0),
        *positions.stride(), sections[0], sections[1], eps, **constants,
    )  # fmt: skip
    return q, k


@triton.jit
def _normed_grad(q_grad_ptr, k_grad_ptr, token, heads, num_q_heads, num_kv_heads, cos, sin, lanes, HALF: tl.constexpr):
    """Gradient halves [HEADS, LANES] before the rotation; zero for value heads."""
    within = (lanes < HALF)[None, :]
    is_q = (heads < num_q_heads) & within
    is_k = (heads >= num_q_heads) & (heads < num_q_heads + num_kv_heads) & within
    q = q_grad_ptr + (token * num_q_heads + heads) * 2 * HALF + lanes[None, :]
    k = k_grad_ptr + (token * num_kv_heads + heads - num_q_heads) * 2 * HALF + lanes[None, :]
    first = tl.load(q, is_q, other=0.0).to(tl.float32) + tl.load(k, is_k, other=0.0).to(tl.float32)
    second = tl.load(q + HALF, is_q, other=0.0).to(tl.float32) + tl.load(k + HALF, is_k, other=0.0).to(tl.float32)
    cos, sin = cos[None, :], sin[None, :]
    return first * cos + second * sin, second * cos - first * sin


@triton.jit
def _qk_norm_mrope_bwd_kernel(
    q_grad_ptr, k_grad_ptr, qkv_ptr, q_weight_ptr, k_weight_ptr, positions_ptr, frequencies_ptr, dqkv_ptr, parts_ptr,
    num_tokens, num_q_heads, num_kv_heads, stride_qkv, stride_axis, stride_position, S0, S1, eps,
    HALF: tl.constexpr, HEADS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]  # queries, keys, values
    lanes = tl.arange(0, LANES)
    is_q = heads < num_q_heads
    num_heads = num_q_heads + 2 * num_kv_heads
    mask = (heads < num_heads) & (lanes < HALF)[None, :]
    weight, weight_second = _head_weights(q_weight_ptr, k_weight_ptr, is_q, lanes, HALF)
    part = tl.zeros([HEADS, LANES], tl.float32)
    part_second = tl.zeros([HEADS, LANES], tl.float32)
    for token in range(tl.program_id(0).to(tl.int64), num_tokens, tl.num_programs(0)):
        cos, sin = _sectioned_angles(
            positions_ptr, frequencies_ptr, token, stride_axis, stride_position, lanes, S0, S1, HALF
        )
        grad, grad_second = _normed_grad(
            q_grad_ptr, k_grad_ptr, token, heads, num_q_heads, num_kv_heads, cos, sin, lanes, HALF
        )
        source = qkv_ptr + token * stride_qkv + heads * 2 * HALF + lanes[None, :]
        x = tl.load(source, mask, other=0.0).to(tl.float32)
        x_second = tl.load(source + HALF, mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x + x_second * x_second, 1) / (2 * HALF) + eps)[:, None]
        x, x_second = x * scale, x_second * scale
        part += grad * x
        part_second += grad_second * x_second
        slope, slope_second = grad * weight, grad_second * weight_second
        along = tl.sum(slope * x + slope_second * x_second, 1)[:, None] / (2 * HALF)
        target = dqkv_ptr + (token * num_heads + heads) * 2 * HALF + lanes[None, :]
        tl.store(target, scale * (slope - x * along), mask)
        tl.store(target + HALF, scale * (slope_second - x_second * along), mask)
    target = parts_ptr + (heads * tl.num_programs(0) + tl.program_id(0)) * 2 * HALF + lanes[None, :]
    tl.store(target, part, mask)
    tl.store(target + HALF, part_second, mask)


qk_norm_mrope_backward_refuses = interpreted_bf16


def qk_norm_mrope_backward(
    grad_0: Tensor, grad_1: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor,
    sections: list[int], theta: float, eps: float, num_kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of qk_norm_mrope: qkv, q_weight, k_weight. grad_0 belongs to q, grad_1 to k."""
    rows, head_dim, tokens = as_rows(qkv), q_weight.shape[0], qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim
    num_q_heads = num_heads - 2 * num_kv_heads
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    columns, constants = _tile(num_heads, head_dim // 2)
    num_parts = min(tokens, MAX_PARTS)
    parts = torch.empty((num_heads, num_parts, head_dim), dtype=torch.float32, device=qkv.device)
    launch(
        _qk_norm_mrope_bwd_kernel, (num_parts, columns), grad_0.contiguous(), grad_1.contiguous(), rows,
        q_weight.contiguous(), k_weight.contiguous(), positions, _frequencies(head_dim // 2, theta, qkv.device), dqkv,
        parts, tokens, num_q_heads, num_kv_heads, rows.stride(0), *positions.stride(), sections[0], sections[1], eps,
        **constants,
    )  # fmt: skip
    q_parts, k_parts = parts[:num_q_heads], parts[num_q_heads : num_q_heads + num_kv_heads]
    return dqkv, sum_parts(q_parts.flatten(0, 1), q_weight.dtype), sum_parts(k_parts.flatten(0, 1), k_weight.dtype)

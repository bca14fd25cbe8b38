"""Rotary position embeddings: two-dimensional for patches, sectioned for text with media."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._op import op


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Split-half rotation. x [T, H, D], cos and sin [T, D/2]."""
    first, second = wide(x).chunk(2, dim=-1)  # [T, H, D/2] each
    cos, sin = cos[:, None, :].to(first.dtype), sin[:, None, :].to(first.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def _sectioned(positions: Tensor, sections: list[int], theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [T, D/2] of sectioned positions [3, T]."""
    half = sum(sections)
    exponent = torch.arange(half, device=positions.device, dtype=torch.float64) / half
    frequency = torch.pow(torch.tensor(theta, dtype=torch.float64, device=positions.device), -exponent).to(dtype)
    axis = torch.repeat_interleave(
        torch.arange(3, device=positions.device),
        torch.tensor(sections, device=positions.device),
        output_size=half,
    )
    angles = positions.to(dtype)[axis].T * frequency  # [T, D/2]
    return angles.cos(), angles.sin()


def _table_fits(x: Tensor, cos: Tensor, sin: Tensor) -> Iterator[str]:
    if x.dim() != 3 or x.shape[-1] % 2:
        yield f"x is {tuple(x.shape)}; expected [T, H, D] with an even D"
    elif cos.shape != (x.shape[0], x.shape[-1] // 2) or sin.shape != cos.shape:
        yield f"cos is {tuple(cos.shape)} and sin {tuple(sin.shape)}; expected [{x.shape[0]}, {x.shape[-1] // 2}]"


def _sections_fit(x: Tensor, positions: Tensor, sections: list[int], theta: float) -> Iterator[str]:
    if x.dim() != 3:
        yield f"x is {tuple(x.shape)}; expected [T, H, D]"
        return
    yield from _positions_fit(x.shape[0], x.shape[-1], positions, sections)


def _positions_fit(tokens: int, head_dim: int, positions: Tensor, sections: list[int]) -> Iterator[str]:
    if positions.shape != (3, tokens) or positions.dtype != torch.int64:
        yield f"positions is {positions.dtype} {tuple(positions.shape)}; expected int64 [3, {tokens}]"
    if len(sections) != 3 or min(sections) < 0 or 2 * sum(sections) != head_dim:
        yield f"sections {list(sections)} must be three counts that sum to half of D = {head_dim}"


@op(requires=_table_fits)
def rope_2d(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the heads of patches by a table of angles, split-half.

    y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin, x1 and x2 being the halves of D.

    Shapes     x [T, H, D]  cos, sin [T, D/2]
    Args       x fp32 | bf16 | fp16, rows may be strided;  cos, sin fp32, row angles first, column angles second
    Returns    [T, H, D] dtype of x
    Numerics   fp32, one rounding at the end
    Gradient   x
    Errors     ValueError on shape disagreement
    Source     Su et al. 2021, eq. 34; Heo et al. 2024 for two axes
    """
    return _rotate(x, cos, sin)


@op(requires=_table_fits)
def rope_2d_backward(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of rope_2d with respect to x: the inverse rotation. Shapes as rope_2d."""
    return _rotate(grad, cos, -sin)


rope_2d.implement("cpp")
rope_2d.implement("triton", "rope:rope_2d")
rope_2d.differentiate("x", backward=rope_2d_backward, save=("cos", "sin"))
rope_2d_backward.implement("cpp")
rope_2d_backward.implement("triton", "rope:rope_2d_backward")


@op(requires=_sections_fit)
def mrope(x: Tensor, positions: Tensor, sections: list[int], theta: float) -> Tensor:
    """Sectioned rotary embedding of heads at (time, row, column) positions.

    Frequency i = theta^(-2i/D) turns by the time position for i < sections[0], by the row position for the next
    sections[1], by the column position for the rest; split-half pairs (i, i + D/2). Sectioned, not interleaved.

    Shapes     x [T, H, D]  positions [3, T]
    Args       x fp32 | bf16 | fp16, rows may be strided;  positions int64;  sections three counts, sum D/2
    Returns    [T, H, D] dtype of x
    Numerics   frequencies in fp64, angles in fp32, rotation in fp32
    Gradient   x
    Errors     ValueError on shape or dtype disagreement
    Source     Wang et al. 2024 (Qwen2-VL), section 2.1
    """
    cos, sin = _sectioned(positions, sections, theta, wide(x).dtype)
    return _rotate(x, cos, sin)


@op(requires=_sections_fit)
def mrope_backward(grad: Tensor, positions: Tensor, sections: list[int], theta: float) -> Tensor:
    """Gradient of mrope with respect to x: the inverse rotation. Shapes as mrope."""
    cos, sin = _sectioned(positions, sections, theta, wide(grad).dtype)
    return _rotate(grad, cos, -sin)


mrope.implement("cpp")
mrope.implement("triton", "rope:mrope")
mrope.differentiate("x", backward=mrope_backward, save=("positions", "sections", "theta"))
mrope_backward.implement("cpp")
mrope_backward.implement("triton", "rope:mrope_backward")


def _qkv_fits(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, positions: Tensor, sections: list[int], theta: float,
    eps: float, num_kv_heads: int,
) -> Iterator[str]:  # fmt: skip
    head_dim = q_weight.shape[-1]
    if qkv.dim() != 2 or qkv.shape[-1] % head_dim or qkv.shape[-1] // head_dim <= 2 * num_kv_heads:
        yield f"qkv is {tuple(qkv.shape)}; expected [T, (Hq + 2 x {num_kv_heads}) x {head_dim}] with Hq >= 1"
        return
    if q_weight.dim() != 1 or k_weight.shape != q_weight.shape:
        yield f"q_weight is {tuple(q_weight.shape)} and k_weight {tuple(k_weight.shape)}; both must be [D]"
    yield from _positions_fit(qkv.shape[0], head_dim, positions, sections)


def normed_and_rotated(
    x: Tensor, weight: Tensor, positions: Tensor, sections: list[int], theta: float, eps: float
) -> Tensor:
    """rms_norm over D, rounded as the separate ops would, then mrope. x [T, H, D]."""
    scale = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    normed = (wide(x) * scale).to(x.dtype) * weight
    cos, sin = _sectioned(positions, sections, theta, wide(x).dtype)
    return _rotate(normed, cos, sin)


@op(requires=_qkv_fits)
def qk_norm_mrope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    sections: list[int],
    theta: float,
    eps: float,
    num_kv_heads: int,
) -> tuple[Tensor, Tensor]:
    """Per-head RMS norm of queries and keys, then sectioned rotary embedding, in one pass over the projection.

    Shapes     qkv [T, (Hq + 2 Hkv) D]  q_weight, k_weight [D]  positions [3, T]
    Args       one floating dtype;  positions int64;  sections, theta as mrope;  eps as rms_norm
    Returns    q [T, Hq, D], k [T, Hkv, D]; the values stay the caller's view of qkv
    Numerics   rounded where rms_norm followed by mrope would round
    Gradient   qkv (zero in the value columns), q_weight, k_weight
    Errors     ValueError on shape or dtype disagreement
    Source     Qwen3 technical report, section 2; Wang et al. 2024
    """
    head_dim = q_weight.shape[-1]
    heads = qkv.view(qkv.shape[0], -1, head_dim)  # [T, Hq + 2 Hkv, D]
    num_q_heads = heads.shape[1] - 2 * num_kv_heads
    q, k, _ = heads.split((num_q_heads, num_kv_heads, num_kv_heads), dim=1)
    return (
        normed_and_rotated(q, q_weight, positions, sections, theta, eps),
        normed_and_rotated(k, k_weight, positions, sections, theta, eps),
    )


qk_norm_mrope.implement("cpp")
qk_norm_mrope.implement("triton", "rope:qk_norm_mrope")
qk_norm_mrope_backward = qk_norm_mrope.differentiate("qkv", "q_weight", "k_weight")
qk_norm_mrope_backward.implement("cpp")
qk_norm_mrope_backward.implement("triton", "rope:qk_norm_mrope_backward")

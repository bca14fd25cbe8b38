"""Normalisation: root mean square, with residual, and layer norm."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._op import op


def _weight_fits(x: Tensor, weight: Tensor, *rest: object) -> Iterator[str]:
    if weight.dim() != 1 or x.dim() == 0 or weight.shape[0] != x.shape[-1]:
        yield f"weight is {tuple(weight.shape)}; x {tuple(x.shape)} requires [{x.shape[-1] if x.dim() else 0}]"
    if weight.dtype != x.dtype:
        yield f"weight is {weight.dtype} and x {x.dtype}; they must agree"


def _residual_fits(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Iterator[str]:
    yield from _weight_fits(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        yield f"residual is {residual.dtype} {tuple(residual.shape)}; it must match x, {x.dtype} {tuple(x.shape)}"


def _bias_fits(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Iterator[str]:
    yield from _weight_fits(x, weight)
    if bias.shape != weight.shape or bias.dtype != weight.dtype:
        yield f"bias is {bias.dtype} {tuple(bias.shape)}; it must match weight, {weight.dtype} {tuple(weight.shape)}"


@op(requires=_weight_fits)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last axis.

    y = round(x / sqrt(mean(x^2) + eps)) * weight, rounded to the dtype of x before the product as Qwen3 does.

    Shapes     x [..., D]  weight [D]
    Args       x fp32 | bf16 | fp16;  weight dtype of x;  eps added to the mean square
    Returns    [..., D] dtype of x
    Numerics   sums in fp32
    Gradient   x, weight
    Errors     ValueError on shape or dtype disagreement
    Source     Zhang and Sennrich 2019, eq. 4
    """
    scale = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    return (wide(x) * scale).to(x.dtype) * weight


rms_norm.implement("cpp")
rms_norm.implement("triton", "norm:rms_norm")
rms_norm_backward = rms_norm.differentiate("x", "weight")
rms_norm_backward.implement("cpp")
rms_norm_backward.implement("triton", "norm:rms_norm_backward")


@op(requires=_residual_fits)
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Adds the residual stream, then normalises: (rms_norm(r, weight), r) with r = x + residual.

    Shapes     x, residual [..., D]  weight [D]
    Args       one dtype for all;  eps added to the mean square
    Returns    y [..., D], new residual [..., D] rounded to the dtype of x
    Numerics   the sum is rounded to the dtype of x before it is normalised, as two separate ops would
    Gradient   x, residual, weight
    Errors     ValueError on shape or dtype disagreement
    Source     Zhang and Sennrich 2019, eq. 4; pre-norm residual blocks
    """
    total = x + residual
    scale = torch.rsqrt(wide(total).square().mean(-1, keepdim=True) + eps)
    return (wide(total) * scale).to(x.dtype) * weight, total


add_rms_norm.implement("cpp")
add_rms_norm.implement("triton", "norm:add_rms_norm")
add_rms_norm_backward = add_rms_norm.differentiate("x", "residual", "weight")
add_rms_norm_backward.implement("cpp")
add_rms_norm_backward.implement("triton", "norm:add_rms_norm_backward")


@op(requires=_bias_fits)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer normalisation over the last axis.

    y = (x - mean) / sqrt(var + eps) * weight + bias, with the population variance.

    Shapes     x [..., D]  weight, bias [D]
    Args       one dtype for all;  eps added to the variance
    Returns    [..., D] dtype of x
    Numerics   everything in fp32, one rounding at the end
    Gradient   x, weight, bias
    Errors     ValueError on shape or dtype disagreement
    Source     Ba et al. 2016, eq. 4
    """
    centred = wide(x) - wide(x).mean(-1, keepdim=True)
    scale = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (centred * scale * wide(weight) + wide(bias)).to(x.dtype)


layer_norm.implement("cpp")
layer_norm.implement("triton", "norm:layer_norm")
layer_norm_backward = layer_norm.differentiate("x", "weight", "bias")
layer_norm_backward.implement("cpp")
layer_norm_backward.implement("triton", "norm:layer_norm_backward")

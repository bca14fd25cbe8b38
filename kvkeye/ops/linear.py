"""Linear layers with one order of summation for every number of rows."""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._op import op


def _factors_fit(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Iterator[str]:
    if weight.dim() != 2 or x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        yield f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}; expected [..., K] and [O, K]"
    elif bias is not None and bias.shape != weight.shape[:1]:
        yield f"bias is {tuple(bias.shape)}; expected [{weight.shape[0]}]"
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        yield f"x is {x.dtype}, weight {weight.dtype}; one dtype is required for all"


@op(requires=_factors_fit)
def packed_linear(x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """y = x W^T + b.

    Shapes     x [..., K]  weight [O, K]  bias [O] or None
    Args       one floating dtype for all
    Returns    [..., O] dtype of x
    Numerics   fp32 sums; `cpp` adds products in one order of K whatever the number of rows, so that a row's bits
               do not depend on the batch (torch's own linears differ between 1, 7 and 1024 rows)
    Gradient   x, weight, bias
    Errors     ValueError on shape or dtype disagreement
    Source     -
    """
    # In fp32: torch's own bf16 product fails on CPUs whose AMX tiles the system withholds.
    return torch.nn.functional.linear(wide(x), wide(weight), None if bias is None else wide(bias)).to(x.dtype)


@op
def packed_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of packed_linear.

    Shapes     grad [..., O]  x [..., K]  weight [O, K]  bias [O] or None
    Returns    grad_x [..., K], grad_weight [O, K], grad_bias [O] (empty without bias); dtype of x
    Numerics   fp32 sums
    """
    rows, inputs = grad.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])  # [M, O], [M, K]
    grad_bias = x.new_empty(0) if bias is None else wide(rows).sum(0).to(x.dtype)
    grad_x = torch.matmul(wide(grad), wide(weight))
    grad_weight = wide(rows).T @ wide(inputs)
    return grad_x.to(x.dtype), grad_weight.to(x.dtype), grad_bias


packed_linear.implement("cpp")
packed_linear.implement("triton", "linear:packed_linear")
packed_linear.differentiate("x", "weight", "bias", backward=packed_linear_backward)

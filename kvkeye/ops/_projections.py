"""Matrices of inference layers in whatever form they are, for the bodies of ops that are made of other ops."""

from typing import Optional

from torch import Tensor

from kvkeye.ops.activation import silu_mul
from kvkeye.ops.int8_linear import int8_linear, int8_linear_silu_mul
from kvkeye.ops.linear import packed_linear, prepacked_linear, prepacked_linear_silu_mul


def project(x: Tensor, weight: Tensor, outputs: int, scales: Optional[Tensor] = None) -> Tensor:
    """x W^T of a plain weight, a packed one, or with `scales` one of int8 levels."""
    if scales is not None:
        y: Tensor = int8_linear.reference(x, weight, scales, None)
    elif weight.dim() == 2:
        y = packed_linear(x, weight, None)
    else:
        y = prepacked_linear(x, weight, None, outputs)
    return y


def gated(x: Tensor, weight: Tensor, outputs: int, scales: Optional[Tensor] = None) -> Tensor:
    """silu(first half of x W^T) * second half, of a weight in the same forms."""
    if scales is not None:
        y: Tensor = int8_linear_silu_mul.reference(x, weight, scales)
    elif weight.dim() == 2:
        y = silu_mul(packed_linear(x, weight, None))
    else:
        y = prepacked_linear_silu_mul(x, weight, outputs)
    return y

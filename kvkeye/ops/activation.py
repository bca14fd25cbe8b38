"""Activations of the feed-forward layers."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._op import op


def _halves(gate_up: Tensor) -> Iterator[str]:
    if gate_up.dim() == 0 or gate_up.shape[-1] % 2:
        yield f"gate_up is {tuple(gate_up.shape)}; the last axis must hold gate then up, an even size"


@op(requires=_halves)
def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of one tensor that holds the gate first: [..., 2I] -> [..., I].

    Returns    [..., I] dtype of gate_up
    Numerics   fp32, one rounding at the end
    Gradient   gate_up
    Errors     ValueError if the last axis is odd
    Source     Shazeer 2020, eq. 6 (SwiGLU)
    """
    gate, up = wide(gate_up).chunk(2, dim=-1)  # [..., I] each
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)


silu_mul.implement("cpp")
silu_mul.implement("triton", "activation:silu_mul")
silu_mul_backward = silu_mul.differentiate("gate_up")
silu_mul_backward.implement("cpp")
silu_mul_backward.implement("triton", "activation:silu_mul_backward")


@op
def gelu(x: Tensor, tanh: bool) -> Tensor:
    """Gaussian error linear unit: x * Phi(x), exact (erf) or by the tanh approximation.

    Args       x [...];  tanh: True for 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))
    Returns    [...] dtype of x
    Numerics   fp32, one rounding at the end
    Gradient   x
    Errors     -
    Source     Hendrycks and Gimpel 2016
    """
    value = wide(x)
    if tanh:
        gate = torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3))
    else:
        gate = torch.erf(value * math.sqrt(0.5))
    return (0.5 * value * (1 + gate)).to(x.dtype)


gelu.implement("cpp")
gelu.implement("triton", "activation:gelu")
gelu_backward = gelu.differentiate("x")
gelu_backward.implement("cpp")
gelu_backward.implement("triton", "activation:gelu_backward")

"""Linear layers of int8 weights, for inference on the CPU: half the bytes of bf16 that a step must read.

A number is a level in -127..127 times a scale: one per output of a weight, fixed when it is quantised; one per row of
inputs, found when the row comes, so that a row's bits do not depend on the rows beside it. Products of levels are
summed in integers: every instruction set gives the same bits.
"""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._op import op
from kvkeye.ops.activation import silu_mul
from kvkeye.ops.linear import PANEL, pack_weight, unpack_weight

MAX_LEVEL = 127
#: A row without a larger magnitude counts as zero: the inverse of its scale would overflow.
LEAST_MAGNITUDE = 1e-30
#: Added to the levels of a packed weight, which is unsigned.
ZERO_LEVEL = 128
#: Products of a level and an unsigned level whose sum fits into 32 bits.
MAX_INPUTS = (2**31 - 1) // (255 * MAX_LEVEL)
#: Levels of one word of four bytes.
_VALUES = 4


def _quantize(rows: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] -> levels [..., K] fp32 and scales [..., 1] fp32; NaN is the scale of a row that is not finite."""
    numbers = rows.float()
    largest = numbers.abs().amax(-1, keepdim=True)
    finite, counts = largest.isfinite(), largest >= LEAST_MAGNITUDE
    levels = torch.where(finite & counts, (numbers * (largest.reciprocal() * MAX_LEVEL)).round(), 0.0)
    scales = torch.where(counts, largest * (1.0 / MAX_LEVEL), 0.0)
    return levels, torch.where(finite, scales, torch.nan)


def _can_be_quantized(weight: Tensor, parts: int) -> Iterator[str]:
    if weight.dim() != 2 or not 1 <= weight.shape[1] <= MAX_INPUTS:
        yield f"weight is {tuple(weight.shape)}; expected [O, K] with K from 1 to {MAX_INPUTS}"
    elif parts not in (1, 2) or weight.shape[0] % parts:
        yield f"parts is {parts} for {weight.shape[0]} outputs; expected 1, or 2 for an even number"
    if not weight.is_floating_point():
        yield f"weight is {weight.dtype}; expected floating numbers"


@op(requires=_can_be_quantized)
def quantize_weight(weight: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """A weight as int8 levels in the order in which the CPU's product reads them, and the scale of every output.

    Shapes     weight [parts * O, K]
    Args       parts: 2 for gate and up in one weight, as in pack_weight
    Returns    packed [ceil(O / 32), parts, ceil(K / 4), 32, 4] uint8: level + 128, also at the edges;
               scales [parts, O] fp32
    Numerics   scale = largest magnitude of the output / 127, level = weight / scale to the nearest, ties to even;
               the scale of an output with an infinity or a NaN is NaN
    Gradient   none: inference only
    Errors     ValueError if the outputs do not fall into `parts` equal parts or sums could overflow
    Source     -
    """
    levels, scales = _quantize(weight)
    packed = pack_weight.reference(levels, parts, _VALUES)
    return (packed + ZERO_LEVEL).to(torch.uint8), scales.view(parts, -1)


def dequantize_weight(packed: Tensor, scales: Tensor, inputs: int) -> Tensor:
    """[parts * O, K] fp32: what the levels of quantize_weight stand for."""
    levels = unpack_weight(packed, scales.shape[1], inputs).float() - ZERO_LEVEL
    return levels * scales.view(-1, 1)


def _levels_fit(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Optional[Tensor] = None, parts: int = 1
) -> Iterator[str]:
    if x.dim() == 0 or not 1 <= x.shape[-1] <= MAX_INPUTS or not x.is_floating_point():
        yield f"x is {tuple(x.shape)} of {x.dtype}; expected floating [..., K] with K from 1 to {MAX_INPUTS}"
        return
    if scales.dim() != 2 or scales.shape[0] != parts or scales.dtype != torch.float32:
        yield f"scales are {tuple(scales.shape)} of {scales.dtype}; expected fp32 [{parts}, O]"
        return
    outputs = scales.shape[1]
    expected = (-(-outputs // PANEL), parts, -(-x.shape[-1] // _VALUES), PANEL, _VALUES)
    if packed.shape != expected or packed.dtype != torch.uint8:
        yield (
            f"packed is {tuple(packed.shape)} of {packed.dtype}; {outputs} outputs of {x.shape[-1]} inputs require "
            f"uint8 {list(expected)}"
        )
    if bias is not None and bias.shape != (outputs,):
        yield f"bias is {tuple(bias.shape)}; expected [{outputs}]"
    if bias is not None and bias.dtype != x.dtype:
        yield f"x is {x.dtype}, bias {bias.dtype}; one dtype is required for both"


def _product(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """[..., parts * O] fp32. Sums of levels are below 2^31: exact in fp64, rounded once."""
    levels, of_rows = _quantize(x)
    weight = unpack_weight(packed, scales.shape[1], x.shape[-1]).double() - ZERO_LEVEL
    sums = torch.nn.functional.linear(levels.double(), weight).float()
    return sums * of_rows * scales.flatten()


@op(requires=_levels_fit)
def int8_linear(x: Tensor, packed: Tensor, scales: Tensor, bias: Optional[Tensor]) -> Tensor:
    """y = x W^T + b, x and W as int8 levels.

    Shapes     x [..., K]  packed, scales [1, O] quantize_weight(weight [O, K], 1)  bias [O] or None
    Returns    [..., O] dtype of x
    Numerics   a row of x is quantised like an output of a weight; the sum of products of levels is exact; times the
               row's scale, times the output's, plus the bias, each rounded to fp32. All implementations give the same
               bits. A row with an infinity or a NaN gives NaN.
    Gradient   none: inference only
    Errors     ValueError on shape or dtype disagreement
    Source     Dettmers et al. 2022 (LLM.int8), section 2.1, vector-wise quantisation
    """
    y = _product(x, packed, scales)
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def _residual_fits(
    x: Tensor, packed: Tensor, scales: Tensor, bias: Optional[Tensor], residual: Tensor
) -> Iterator[str]:
    yield from _levels_fit(x, packed, scales, bias)
    if scales.dim() == 2 and residual.shape != (*x.shape[:-1], scales.shape[1]):
        yield f"residual is {tuple(residual.shape)}; expected {[*x.shape[:-1], scales.shape[1]]}"
    if residual.dtype != x.dtype:
        yield f"x is {x.dtype}, residual {residual.dtype}; one dtype is required for both"


@op(requires=_residual_fits)
def int8_linear_add(x: Tensor, packed: Tensor, scales: Tensor, bias: Optional[Tensor], residual: Tensor) -> Tensor:
    """residual + int8_linear(x, packed, scales, bias).

    Shapes     x [..., K]  packed, scales [1, O] quantize_weight(weight [O, K], 1)  bias [O] or None  residual [..., O]
    Returns    [..., O] dtype of x
    Numerics   the bits of the two ops: the product is rounded before the sum
    Gradient   none: inference only
    Errors     ValueError on shape or dtype disagreement
    Source     -
    """
    y = int8_linear.reference(x, packed, scales, bias)
    return (wide(residual) + wide(y)).to(x.dtype)


def _gate_fits(x: Tensor, packed: Tensor, scales: Tensor) -> Iterator[str]:
    yield from _levels_fit(x, packed, scales, None, 2)


@op(requires=_gate_fits)
def int8_linear_silu_mul(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """silu(gate) * up of one product whose weight holds the rows of the gate first.

    Shapes     x [..., K]  packed, scales [2, O] quantize_weight(weight [2 O, K], 2)
    Returns    [..., O] dtype of x
    Numerics   the bits of the product and silu_mul: the product is rounded before the activation
    Gradient   none: inference only
    Errors     ValueError on shape or dtype disagreement
    Source     Shazeer 2020, eq. 6 (SwiGLU)
    """
    return silu_mul.reference(_product(x, packed, scales).to(x.dtype))  # type: ignore[no-any-return]


quantize_weight.implement("cpp")
int8_linear.implement("cpp")
int8_linear_add.implement("cpp")
int8_linear_silu_mul.implement("cpp")

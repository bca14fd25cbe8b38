"""Linear layers with one order of summation for every number of rows.

Two forms of weights. Plain ones [O, K] serve training and every device. Packed ones serve inference on the CPU: panels
of 32 outputs side by side, read from end to end at every call; what follows the product in a layer is then done before
the result leaves the cache. Form and epilogue change no bit of `cpp`.
"""

from collections.abc import Iterator
from typing import Optional

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._op import op
from kvkeye.ops.activation import gelu, silu_mul

#: Outputs of one panel of a packed weight.
PANEL = 32


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


def values_per_word(dtype: torch.dtype) -> int:
    """Neighbours in k that the CPU's product wants together in a packed weight: what fits into four bytes."""
    return max(1, 4 // dtype.itemsize)


def _halves_fit(weight: Tensor, parts: int, values: int) -> Iterator[str]:
    if weight.dim() != 2:
        yield f"weight is {tuple(weight.shape)}; expected [O, K]"
    elif parts not in (1, 2) or weight.shape[0] % parts:
        yield f"parts is {parts} for {weight.shape[0]} outputs; expected 1, or 2 for an even number"
    if values < 1:
        yield f"values is {values}; expected at least 1"


def _words(weight: Tensor, parts: int, values: int) -> Iterator[str]:
    if values != values_per_word(weight.dtype):
        yield f"values is {values}; cpp takes words of four bytes"


@op(requires=_halves_fit)
def pack_weight(weight: Tensor, parts: int, values: int) -> Tensor:
    """A weight in the order in which the CPU's product reads it.

    Shapes     weight [parts * O, K]
    Args       parts: 2 for gate and up in one weight: their panels alternate;  values: v, neighbours in k that lie
               together, values_per_word(dtype)
    Returns    [ceil(O / 32), parts, ceil(K / v), 32, v] dtype of weight; zeros at the edges
    Numerics   exact
    Gradient   none: inference only
    Errors     ValueError if the outputs do not fall into `parts` equal parts
    Source     -
    """
    outputs = weight.shape[0] // parts
    rows = weight.unflatten(0, (parts, outputs))
    padded = torch.nn.functional.pad(rows, (0, -weight.shape[1] % values, 0, -outputs % PANEL))
    panels = padded.unflatten(2, (-1, values)).unflatten(1, (-1, PANEL))  # [parts, blocks, 32, words, v]
    packed: Tensor = panels.permute(1, 0, 3, 2, 4).clone(memory_format=torch.contiguous_format)
    return packed


def unpack_weight(packed: Tensor, outputs: int, inputs: int) -> Tensor:
    """The weight [parts * O, K] that pack_weight was given. outputs: O, of one part."""
    rows = packed.permute(1, 0, 3, 2, 4).flatten(3, 4).flatten(1, 2)  # [parts, blocks * 32, words * v]
    return rows[:, :outputs, :inputs].flatten(0, 1)


def _packed_fits(x: Tensor, packed: Tensor, bias: Optional[Tensor], outputs: int, parts: int = 1) -> Iterator[str]:
    if x.dim() == 0 or packed.dim() != 5 or packed.shape[1] != parts:
        yield f"x is {tuple(x.shape)} and packed {tuple(packed.shape)}; expected [..., K], pack_weight(W, {parts}, v)"
        return
    blocks, _, words, panel, values = packed.shape
    if panel != PANEL or words != -(-x.shape[-1] // values) or blocks != -(-outputs // PANEL):
        yield (
            f"packed is {tuple(packed.shape)}; {outputs} outputs of {x.shape[-1]} inputs require "
            f"{[-(-outputs // PANEL), parts, -(-x.shape[-1] // values), PANEL, values]}"
        )
    if bias is not None and bias.shape != (outputs,):
        yield f"bias is {tuple(bias.shape)}; expected [{outputs}]"
    if packed.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        yield f"x is {x.dtype}, packed {packed.dtype}; one dtype is required for all"


@op(requires=_packed_fits)
def prepacked_linear(x: Tensor, packed: Tensor, bias: Optional[Tensor], outputs: int) -> Tensor:
    """packed_linear of a packed weight.

    Shapes     x [..., K]  packed pack_weight(weight [O, K], 1, v)  bias [O] or None
    Args       outputs: O
    Returns    [..., O] dtype of x
    Numerics   the bits of packed_linear
    Gradient   none: inference only
    Errors     ValueError on shape or dtype disagreement
    Source     -
    """
    return packed_linear.reference(x, unpack_weight(packed, outputs, x.shape[-1]), bias)  # type: ignore[no-any-return]


def _gelu_fits(x: Tensor, packed: Tensor, bias: Optional[Tensor], outputs: int, tanh: bool) -> Iterator[str]:
    yield from _packed_fits(x, packed, bias, outputs)


@op(requires=_gelu_fits)
def prepacked_linear_gelu(x: Tensor, packed: Tensor, bias: Optional[Tensor], outputs: int, tanh: bool) -> Tensor:
    """gelu(prepacked_linear(x, packed, bias, outputs), tanh).

    Shapes     x [..., K]  packed pack_weight(weight [O, K], 1, v)  bias [O] or None
    Returns    [..., O] dtype of x
    Numerics   the bits of the two ops: the product is rounded before the activation
    Gradient   none: inference only
    Errors     ValueError on shape or dtype disagreement
    Source     -
    """
    y = prepacked_linear.reference(x, packed, bias, outputs)
    return gelu.reference(y, tanh)  # type: ignore[no-any-return]


def _residual_fits(x: Tensor, packed: Tensor, bias: Optional[Tensor], residual: Tensor) -> Iterator[str]:
    if residual.dim() == 0 or residual.shape[:-1] != x.shape[:-1]:
        yield f"residual is {tuple(residual.shape)} and x {tuple(x.shape)}; expected [..., O] and [..., K]"
        return
    yield from _packed_fits(x, packed, bias, residual.shape[-1])
    if residual.dtype != x.dtype:
        yield f"x is {x.dtype}, residual {residual.dtype}; one dtype is required for all"


@op(requires=_residual_fits)
def prepacked_linear_add(x: Tensor, packed: Tensor, bias: Optional[Tensor], residual: Tensor) -> Tensor:
    """residual + prepacked_linear(x, packed, bias, O).

    Shapes     x [..., K]  packed pack_weight(weight [O, K], 1, v)  bias [O] or None  residual [..., O]
    Returns    [..., O] dtype of x
    Numerics   the bits of the two ops: the product is rounded before the sum
    Gradient   none: inference only
    Errors     ValueError on shape or dtype disagreement
    Source     -
    """
    y = prepacked_linear.reference(x, packed, bias, residual.shape[-1])
    return (wide(residual) + wide(y)).to(x.dtype)


def _gate_fits(x: Tensor, packed: Tensor, outputs: int) -> Iterator[str]:
    yield from _packed_fits(x, packed, None, outputs, 2)


@op(requires=_gate_fits)
def prepacked_linear_silu_mul(x: Tensor, packed: Tensor, outputs: int) -> Tensor:
    """silu(gate) * up of one product whose weight holds the rows of the gate first.

    Shapes     x [..., K]  packed pack_weight(weight [2 O, K], 2, v)
    Returns    [..., O] dtype of x
    Numerics   the bits of packed_linear and silu_mul: the product is rounded before the activation
    Gradient   none: inference only
    Errors     ValueError on shape or dtype disagreement
    Source     Shazeer 2020, eq. 6 (SwiGLU)
    """
    weight = unpack_weight(packed, outputs, x.shape[-1])
    return silu_mul.reference(packed_linear.reference(x, weight, None))  # type: ignore[no-any-return]


packed_linear.implement("cpp")
packed_linear.implement("cuda", "_cublas:packed_linear")
packed_linear.implement("triton", "linear:packed_linear")
packed_linear.differentiate("x", "weight", "bias", backward=packed_linear_backward)
pack_weight.implement("cpp", refuses=_words)
prepacked_linear.implement("cpp")
prepacked_linear_gelu.implement("cpp")
prepacked_linear_add.implement("cpp")
prepacked_linear_silu_mul.implement("cpp")

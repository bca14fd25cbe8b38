"""Cases of the int8_linear family."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvkeye import ops
from kvkeye.testing.case import Bad, Case, Cost, Sample, cases

#: Rows, inputs, outputs: one tile and several, whole chunks and rests, panels that are not full.
_SHAPES = ((1, 1, 1), (1, 131, 7), (5, 256, 70), (12, 72, 32), (13, 517, 130), (200, 40, 33))


def _quantized(sample: Sample, outputs: int, inputs: int, parts: int = 1) -> tuple[Tensor, Tensor]:
    packed, scales = ops.quantize_weight.reference(sample(parts * outputs, inputs, scale=0.1), parts)
    return packed, scales


@cases("quantize_weight")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for parts, outputs, inputs in ((1, 1, 1), (1, 32, 256), (1, 70, 33), (2, 5, 517), (2, 66, 16)):
        yield Case(f"{parts}x{outputs}x{inputs}", (sample(parts * outputs, inputs), parts))
    special = sample(5, 9)
    special[0], special[1] = 0, special[1] * 1e-38
    yield Case("zero_and_tiny", (special, 1))
    yield Bad("odd", (sample(7, 4), 2), "parts is 2 for 7 outputs")
    yield Bad("one_axis", (sample(7), 1), "expected [O, K]")
    yield Bad("no_inputs", (sample(7, 0), 1), "K from 1")
    yield Bad("integers", (torch.ones(3, 4, dtype=torch.int32), 1), "expected floating")


@cases("int8_linear")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for rows, inputs, outputs in _SHAPES:
        bias = sample(outputs) if rows % 2 else None
        args = (sample(rows, inputs), *_quantized(sample, outputs, inputs), bias)
        yield Case(f"M{rows}_K{inputs}_O{outputs}", args)
    special = sample(4, 16)
    special[0], special[1] = 0, special[1] * 1e-38
    yield Case("zero_and_tiny", (special, *_quantized(sample, 8, 16), None))
    yield Case("three_axes", (sample(2, 3, 16), *_quantized(sample, 8, 16), None))
    yield Case("no_rows", (sample(0, 16), *_quantized(sample, 8, 16), None))
    if sample.big:
        for rows in (1, 8, 512):
            cost = Cost(bytes=3072 * 1024 + rows * 4096 * sample.itemsize, flops=2 * rows * 3072 * 1024)
            args = (sample(rows, 1024), *_quantized(sample, 3072, 1024), None)
            yield Case(f"M{rows}_K1024_O3072", args, cost, small=False, bench=True)
    packed, scales = _quantized(sample, 4, 20)
    yield Bad("words", (sample(2, 9), packed, scales, None), "4 outputs of 9 inputs require")
    yield Bad("levels", (sample(2, 20), packed.float(), scales, None), "require uint8")
    yield Bad("scales", (sample(2, 20), packed, scales[0], None), "expected fp32 [1, O]")
    yield Bad("bias", (sample(2, 20), packed, scales, sample(3)), "bias is (3,)")
    yield Bad("bias_dtype", (sample(2, 20), packed, scales, sample(4).double()), "bias torch.float64")
    yield Bad("no_inputs", (sample(2, 0), packed, scales, None), "K from 1")


@cases("int8_linear_add")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for rows, inputs, outputs in _SHAPES:
        args = (sample(rows, inputs), *_quantized(sample, outputs, inputs), sample(outputs), sample(rows, outputs))
        yield Case(f"M{rows}_K{inputs}_O{outputs}", args)
    weight = _quantized(sample, 4, 8)
    yield Bad("rows", (sample(2, 8), *weight, None, sample(3, 4)), "residual is (3, 4)")
    yield Bad("dtype", (sample(2, 8), *weight, None, sample(2, 4).double()), "residual torch.float64")


@cases("int8_linear_silu_mul")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for rows, inputs, outputs in _SHAPES:
        yield Case(f"M{rows}_K{inputs}_O{outputs}", (sample(rows, inputs), *_quantized(sample, outputs, inputs, 2)))
    yield Bad("parts", (sample(2, 8), *_quantized(sample, 8, 8)), "expected fp32 [2, O]")

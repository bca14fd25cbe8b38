"""Cases of the linear family."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from kvkeye import ops
from kvkeye.testing.case import Bad, Case, Cost, Sample, cases


@cases("packed_linear")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for rows, inputs, outputs in ((1, 1, 1), (1, 100, 7), (3, 33, 50), (8, 128, 96), (17, 588, 72), (64, 70, 33)):
        name = f"M{rows}_K{inputs}_O{outputs}"
        yield Case(name, (sample(rows, inputs), sample(outputs, inputs, scale=0.1), None))
        yield Case(name + "_bias", (sample(rows, inputs), sample(outputs, inputs, scale=0.1), sample(outputs)))
    yield Case("three_axes", (sample(2, 3, 16), sample(8, 16), sample(8)))
    yield Case("no_rows", (sample(0, 16), sample(8, 16), None))
    if sample.big:
        for rows in (1, 8, 512):
            cost = Cost(
                bytes=(3072 * 1024 + rows * 4096) * sample.itemsize,
                flops=2 * rows * 3072 * 1024,
            )
            args = (sample(rows, 1024), sample(3072, 1024, scale=0.03), None)
            yield Case(f"M{rows}_K1024_O3072", args, cost, small=False, bench=True)
    yield Bad("inner", (sample(2, 8), sample(4, 9), None), "expected [..., K] and [O, K]")
    yield Bad("bias", (sample(2, 8), sample(4, 8), sample(3)), "bias is (3,)")
    yield Bad("dtype", (sample(2, 8), sample(4, 8).double(), None), "one dtype is required")


#: Rows, inputs, outputs: one tile and several, whole chunks and rests, panels that are not full.
_SHAPES = ((1, 1, 1), (1, 131, 7), (5, 128, 70), (12, 72, 64), (13, 257, 130), (200, 40, 33))


def _packed(sample: Sample, outputs: int, inputs: int, parts: int = 1) -> Tensor:
    packed: Tensor = ops.pack_weight.reference(
        sample(parts * outputs, inputs, scale=0.1), parts, ops.values_per_word(sample.dtype)
    )
    return packed


@cases("pack_weight")
def _(sample: Sample) -> Iterator[Case | Bad]:
    values = ops.values_per_word(sample.dtype)
    for parts, outputs, inputs in ((1, 1, 1), (1, 64, 128), (1, 70, 33), (2, 5, 131), (2, 130, 16)):
        yield Case(f"{parts}x{outputs}x{inputs}", (sample(parts * outputs, inputs), parts, values))
    yield Case("other_values", (sample(5, 7), 1, 3), must_accept=())
    yield Bad("odd", (sample(7, 4), 2, values), "parts is 2 for 7 outputs")
    yield Bad("one_axis", (sample(7), 1, values), "expected [O, K]")
    yield Bad("values", (sample(7, 4), 1, 0), "values is 0")


@cases("prepacked_linear")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for rows, inputs, outputs in _SHAPES:
        packed, bias = _packed(sample, outputs, inputs), sample(outputs)
        yield Case(f"M{rows}_K{inputs}_O{outputs}", (sample(rows, inputs), packed, bias, outputs))
    yield Case("three_axes", (sample(2, 3, 16), _packed(sample, 8, 16), None, 8))
    yield Case("no_rows", (sample(0, 16), _packed(sample, 8, 16), None, 8))
    if sample.big:
        for rows in (1, 8, 512):
            cost = Cost(bytes=(3072 * 1024 + rows * 4096) * sample.itemsize, flops=2 * rows * 3072 * 1024)
            args = (sample(rows, 1024), _packed(sample, 3072, 1024), None, 3072)
            yield Case(f"M{rows}_K1024_O3072", args, cost, small=False, bench=True)
    yield Bad("words", (sample(2, 9), _packed(sample, 4, 20), None, 4), "4 outputs of 9 inputs require")
    yield Bad("outputs", (sample(2, 8), _packed(sample, 65, 8), None, 64), "64 outputs of 8 inputs require")
    yield Bad("parts", (sample(2, 8), _packed(sample, 4, 8, 2), None, 4), "pack_weight(W, 1, v)")
    yield Bad("bias", (sample(2, 8), _packed(sample, 4, 8), sample(3), 4), "bias is (3,)")
    yield Bad("dtype", (sample(2, 8).double(), _packed(sample, 4, 8), None, 4), "one dtype is required")


@cases("prepacked_linear_gelu")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for rows, inputs, outputs in _SHAPES:
        for tanh in (True, False):
            args = (sample(rows, inputs), _packed(sample, outputs, inputs), sample(outputs), outputs, tanh)
            yield Case(f"M{rows}_K{inputs}_O{outputs}_{'tanh' if tanh else 'erf'}", args)
    yield Bad("bias", (sample(2, 8), _packed(sample, 4, 8), sample(3), 4, True), "bias is (3,)")


@cases("prepacked_linear_add")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for rows, inputs, outputs in _SHAPES:
        args = (sample(rows, inputs), _packed(sample, outputs, inputs), sample(outputs), sample(rows, outputs))
        yield Case(f"M{rows}_K{inputs}_O{outputs}", args)
    yield Bad("rows", (sample(2, 8), _packed(sample, 4, 8), None, sample(3, 4)), "residual is (3, 4)")
    yield Bad("dtype", (sample(2, 8), _packed(sample, 4, 8), None, sample(2, 4).double()), "residual torch.float64")


@cases("prepacked_linear_silu_mul")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for rows, inputs, outputs in _SHAPES:
        args = (sample(rows, inputs), _packed(sample, outputs, inputs, 2), outputs)
        yield Case(f"M{rows}_K{inputs}_O{outputs}", args)
    yield Bad("parts", (sample(2, 8), _packed(sample, 8, 8), 4), "pack_weight(W, 2, v)")

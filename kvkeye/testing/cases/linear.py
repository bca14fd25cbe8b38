"""Cases of the linear family."""

from __future__ import annotations

from collections.abc import Iterator

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

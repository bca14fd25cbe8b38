"""Cases of the normalisation family."""

from __future__ import annotations

from collections.abc import Iterator

from kvkeye.testing.case import Bad, Case, Cost, Sample, cases

_SHAPES = ((1, 8), (3, 100), (7, 128), (2, 3, 144), (5, 1152))


def _sizes(sample: Sample) -> Iterator[tuple[str, tuple[int, ...], bool]]:
    for shape in _SHAPES:
        yield "x".join(map(str, shape)), shape, False
    if sample.big:
        yield "1024x4096", (1024, 4096), True
        yield "4096x4096", (4096, 4096), True  # larger than the caches


@cases("rms_norm")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for name, shape, big in _sizes(sample):
        x = sample(*shape)
        cost = Cost(bytes=2 * x.numel() * sample.itemsize, flops=4 * x.numel())
        yield Case(name, (x, sample(shape[-1]), 1e-6), cost, small=not big, bench=big)
    yield Case("large_values", (sample(4, 64, scale=1e4), sample(64), 1e-6))
    yield Case("zeros", (sample(2, 16) * 0, sample(16), 1e-6))
    yield Case("no_rows", (sample(0, 16), sample(16), 1e-6))
    yield Bad("short_weight", (sample(2, 16), sample(8), 1e-6), "weight is (8,)")
    yield Bad("other_dtype", (sample(2, 16), sample(16).double(), 1e-6), "they must agree")


@cases("add_rms_norm")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for name, shape, big in _sizes(sample):
        x = sample(*shape)
        cost = Cost(bytes=4 * x.numel() * sample.itemsize, flops=5 * x.numel())
        yield Case(name, (x, sample(*shape), sample(shape[-1]), 1e-6), cost, small=not big, bench=big)
    yield Bad("other_residual", (sample(2, 16), sample(3, 16), sample(16), 1e-6), "residual is")


@cases("layer_norm")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for name, shape, big in _sizes(sample):
        x = sample(*shape)
        cost = Cost(bytes=2 * x.numel() * sample.itemsize, flops=6 * x.numel())
        yield Case(name, (x, sample(shape[-1]), sample(shape[-1]), 1e-6), cost, small=not big, bench=big)
    yield Case("offset", (sample(4, 72) + 50, sample(72), sample(72), 1e-5))
    yield Bad("short_bias", (sample(2, 16), sample(16), sample(8), 1e-6), "bias is")

"""Cases of the activation family."""

from __future__ import annotations

from collections.abc import Iterator

from kvkeye.testing.case import Bad, Case, Cost, Sample, cases


@cases("silu_mul")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for rows, width in ((1, 2), (3, 14), (5, 256), (2, 2048)):
        yield Case(f"{rows}x{width}", (sample(rows, width, scale=3.0),))
    yield Case("extreme", (sample(4, 64, scale=60.0),))
    if sample.big:
        for rows in (1024, 4096):  # the second one is larger than the caches
            x = sample(rows, 6144)
            cost = Cost(bytes=3 * x.numel() // 2 * sample.itemsize)
            yield Case(f"{rows}x6144", (x,), cost, small=False, bench=True)
    yield Bad("odd", (sample(2, 7),), "even size")


@cases("gelu")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for tanh in (True, False):
        name = "tanh" if tanh else "erf"
        for shape in ((1, 1), (3, 13), (4, 576)):
            yield Case(f"{name}_{'x'.join(map(str, shape))}", (sample(*shape, scale=2.0), tanh))
        yield Case(f"{name}_extreme", (sample(4, 64, scale=40.0), tanh))
        if sample.big:
            for rows in (1024, 5476):  # the second one is larger than the caches
                x = sample(rows, 4304)
                cost = Cost(bytes=2 * x.numel() * sample.itemsize)
                yield Case(f"{name}_{rows}x4304", (x, tanh), cost, small=False, bench=True)

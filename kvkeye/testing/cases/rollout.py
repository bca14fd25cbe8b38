"""Cases of the rollout family."""

from __future__ import annotations

from collections.abc import Iterator

from kvkeye.testing.case import Bad, Case, Cost, Sample, cases


@cases("score_candidates")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for count, channels, frames, height, width, grid in ((1, 1, 1, 2, 2, 2), (3, 4, 5, 8, 12, 4), (2, 3, 4, 7, 19, 3)):
        shape = (count, channels, frames, height, width)
        args = (sample(*shape), sample(*shape), 0.7, sample.fp32(channels, height, width), grid)
        yield Case(f"{'x'.join(map(str, shape))}_grid{grid}", args)
    x = sample(2, 3, 4, 6, 6)
    yield Case("clean", (x, x, 0.0, sample.fp32(3, 6, 6), 2))
    yield Case("nobody", (x[:0], x[:0], 0.5, sample.fp32(3, 6, 6), 2))
    if sample.big:
        x, v = sample(5, 16, 21, 60, 104), sample(5, 16, 21, 60, 104)
        cost = Cost(bytes=2 * x.numel() * sample.itemsize)
        yield Case("5_480p_T21", (x, v, 0.6, sample.fp32(16, 60, 104), 8), cost, small=False, bench=True)
    guide = sample.fp32(3, 6, 6)
    yield Bad("axes", (x[0], x[0], 0.5, guide, 2), "expected [N, C, T, h, w]")
    x = sample(2, 3, 4, 6, 6)
    yield Bad("velocity", (x, x[:1], 0.5, guide, 2), "expected that of x")
    yield Bad("guide", (x, x, 0.5, guide.half(), 2), "expected fp32 [3, 6, 6]")
    yield Bad("grid", (x, x, 0.5, guide, 7), "expected 2 to the frame's shorter side, 6")

"""Cases of the vision family."""

from __future__ import annotations

from collections.abc import Iterator

from kvkeye.testing.case import Bad, Case, Cost, Sample, cases


@cases("interpolate_position")
def _(sample: Sample) -> Iterator[Case | Bad]:
    yield Case("one_patch", (sample(3, 3, 8), [1, 1, 1]))
    yield Case("identity", (sample(4, 4, 8), [1, 4, 4]))
    yield Case("two_pictures", (sample(7, 7, 24), [1, 4, 10, 2, 12, 2]))
    yield Case("shrink", (sample(27, 27, 16), [1, 2, 6, 3, 4, 4]))
    if sample.big:
        cost = Cost(bytes=(729 + 5476) * 1152 * sample.itemsize)
        yield Case("74x74", (sample(27, 27, 1152), [1, 74, 74]), cost, small=False, bench=True)
    yield Case("nothing", (sample(3, 3, 8), []))
    yield Bad("not_square", (sample(3, 4, 8), [1, 2, 2]), "expected [n, n, d]")
    yield Bad("pairs", (sample(3, 3, 8), [2, 2]), "must be flat triples")


@cases("merge_patches")
def _(sample: Sample) -> Iterator[Case | Bad]:
    yield Case("one_window", (sample(4, 8), [1, 2, 2], 2))
    yield Case("two_pictures", (sample(24 + 48, 12), [1, 4, 6, 2, 12, 2], 2))
    yield Case("merge_1", (sample(6, 5), [1, 2, 3], 1))
    yield Case("merge_3", (sample(36, 4), [1, 6, 6], 3))
    if sample.big:
        cost = Cost(bytes=2 * 5476 * 1152 * sample.itemsize)
        yield Case("74x74", (sample(5476, 1152), [1, 74, 74], 2), cost, small=False, bench=True)
    yield Case("nothing", (sample(0, 8), [], 2))
    yield Bad("odd", (sample(6, 8), [1, 2, 3], 2), "must be a multiple of merge")
    yield Bad("rows", (sample(5, 8), [1, 2, 2], 2), "grid_thw counts 4")
    yield Bad("axes", (sample(5), [1, 2, 2], 2), "expected [N, d]")


@cases("merge_patches_backward")
def _(sample: Sample) -> Iterator[Case | Bad]:
    yield Bad("width", (sample(2, 7), [1, 2, 4], 2), "expected [N / merge^2, merge^2 d]")

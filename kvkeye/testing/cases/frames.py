"""Cases of the frames family."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvkeye.testing.case import Bad, Case, Cost, Sample, cases


def _levels(sample: Sample, *shape: int) -> Tensor:
    return sample.integers(0, 256, *shape, dtype=torch.uint8)


@cases("hsv_patches")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for height, width, patch in ((28, 28, 28), (56, 84, 28), (15, 10, 5), (3, 4, 1), (40, 40, 20)):
        yield Case(f"{height}x{width}_{patch}", (_levels(sample, height, width, 3), patch))
    yield Case("dark", (_levels(sample, 56, 56, 3) // 64, 28))
    yield Case("grey", (_levels(sample, 28, 28, 1).expand(28, 28, 3).contiguous(), 28))
    if sample.big:
        cost = Cost(bytes=2 * 3 * 308 * 532)
        yield Case("fast_frame", (_levels(sample, 308, 532, 3), 28), cost, small=False, bench=True)
    yield Bad("floats", (sample(28, 28, 3), 28), "expected uint8 [height, width, 3]")
    yield Bad("multiple", (_levels(sample, 28, 30, 3), 28), "positive multiples of patch_size")
    yield Bad("patch", (_levels(sample, 28, 28, 3), 0), "positive multiples of patch_size")


@cases("patch_products")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for rows, size in ((1, 1), (3, 75), (10, 2352)):
        yield Case(f"{rows}x{size}", (_levels(sample, rows, size), _levels(sample, rows, size)))
    white = torch.full((2, 100_003), 255, dtype=torch.uint8)  # the sum needs more than 32 bits
    yield Case("white", (white, white))
    yield Case("nothing", (_levels(sample, 0, 8), _levels(sample, 0, 8)))
    if sample.big:
        cost = Cost(bytes=2 * 209 * 2352)
        args = (_levels(sample, 209, 2352), _levels(sample, 209, 2352))
        yield Case("fast_frame", args, cost, small=False, bench=True)
    yield Bad("shapes", (_levels(sample, 2, 8), _levels(sample, 2, 9)), "expected uint8 [n, d] both")
    yield Bad("floats", (sample(2, 8), sample(2, 8)), "expected uint8 [n, d] both")

"""Cases of the vision family."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

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


HALF, CLIP_MEAN, CLIP_STD = [0.5] * 3, [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def _picture(sample: Sample, height: int, width: int) -> Tensor:
    return sample.integers(0, 256, height, width, 3, dtype=torch.uint8)


@cases("pack_patches")
def _(sample: Sample) -> Iterator[Case | Bad]:
    def args(*pairs: tuple[int, int, int, int], bilinear: bool = False, patch: int = 14) -> tuple[Any, ...]:
        """Pictures (height, width) to (rows, columns)."""
        images = [_picture(sample, height, width) for height, width, _, _ in pairs]
        sizes = [side for _, _, rows, columns in pairs for side in (rows, columns)]
        return images, sizes, HALF, HALF, bilinear, patch, sample.dtype

    yield Case("identity", args((28, 42, 28, 42)))
    yield Case("ragged", args((37, 91, 56, 28), (14, 14, 14, 14), (9, 5, 28, 14), (60, 30, 14, 70)))
    yield Case("bilinear", args((37, 91, 56, 28), (20, 9, 14, 42), bilinear=True))
    yield Case("one_pixel", args((1, 1, 14, 28)))
    yield Case("one_axis", args((28, 50, 28, 14), (50, 28, 14, 28)))
    yield Case("patch_16", args((40, 30, 32, 48), patch=16))
    yield Case("patch_20", args((40, 30, 20, 40), patch=20))
    yield Case("clip", ([_picture(sample, 30, 20)], [28, 28], CLIP_MEAN, CLIP_STD, False, 14, sample.dtype))
    if sample.big:
        for bilinear in (False, True):
            name = "1365x768_bilinear" if bilinear else "1365x768"
            cost = Cost(bytes=3 * (768 * 1365 + 728 * 1316 * sample.itemsize))
            yield Case(name, args((768, 1365, 728, 1316), bilinear=bilinear), cost, small=False, bench=True)
    images, *rest = args((28, 28, 28, 28))
    yield Bad("none", ([], [], *rest[1:]), "at least one image")
    yield Bad("sizes", (images, [28], *rest[1:]), "1 numbers in sizes")
    yield Bad("floats", ([images[0].float()], *rest), "expected uint8 [height, width, 3]")
    yield Bad("grey", ([images[0][..., :1]], *rest), "expected uint8 [height, width, 3]")
    yield Bad("empty", ([images[0][:0]], *rest), "sides must be from 1")
    yield Bad("multiple", (images, [28, 30], *rest[1:]), "positive multiples of patch_size")
    yield Bad("std", (images, [28, 28], HALF, [0.5, 0.0, 0.5], False, 14, sample.dtype), "std above 0")
    yield Bad("dtype", (images, [28, 28], HALF, HALF, False, 14, torch.float16), "expected float32 or bfloat16")


@cases("resize_image")
def _(sample: Sample) -> Iterator[Case | Bad]:
    for height, width, rows, columns in ((37, 91, 50, 20), (20, 20, 20, 20), (3, 2, 40, 70), (1, 50, 17, 1)):
        for bilinear in (False, True):
            name = f"{height}x{width}_{rows}x{columns}_{'bilinear' if bilinear else 'bicubic'}"
            yield Case(name, (_picture(sample, height, width), rows, columns, bilinear))
    if sample.big:
        cost = Cost(bytes=3 * (720 * 1280 + 308 * 532))
        yield Case("fast_frame", (_picture(sample, 720, 1280), 308, 532, True), cost, small=False, bench=True)
    yield Bad("floats", (sample(4, 4, 3), 4, 4, False), "expected uint8")
    yield Bad("zero", (_picture(sample, 4, 4), 0, 4, False), "the size is 0 x 4")

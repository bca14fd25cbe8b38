"""The CUDA pack_patches without a GPU: on the host, in shuffled orders, bit for bit as declared and as Pillow."""

from __future__ import annotations

from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torch import Tensor

from kvkeye import ops
from tests.native import cuda_harness as harness
from tests.native import cuda_plants as plants
from tests.native.cuda_harness import Call, Plant

SOURCE = harness.ROOT / "csrc" / "cuda" / "vision.cu"
PATCH, DIM = 14, 588
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]

pytestmark = pytest.mark.skipif(harness.COMPILER is None, reason="no g++")

# (height, width, rows, columns) of the pictures of one call.
BATCHES = {
    "same size": [(28, 42, 28, 42)],
    "one pixel": [(1, 1, 14, 14)],
    "larger": [(17, 19, 126, 140), (10, 300, 28, 308)],
    "smaller": [(61, 100, 28, 42), (40, 29, 14, 28)],
    "one axis only": [(28, 100, 28, 42), (90, 42, 28, 42)],
    "far smaller, many chunks": [(700, 40, 14, 14), (9, 900, 28, 14)],
    "whole tiles and a rest": [(30, 200, 14, 112), (30, 200, 28, 126), (30, 200, 14, 238)],
    "clip of equal frames": [(33, 50, 28, 42)] * 4,
}


def values(dtype: torch.dtype) -> Tensor:
    """What becomes of the 256 levels of each channel, [3, 256]."""
    return ((torch.arange(256) / 255 - torch.tensor(MEAN)[:, None]) / torch.tensor(STD)[:, None]).to(dtype)


def pictures(sizes: list[tuple[int, int, int, int]], seed: int) -> list[Tensor]:
    """Noise, which overshoots at every edge, and pictures of the extreme levels."""
    generator = torch.Generator().manual_seed(seed)
    noise = [torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for h, w, _, _ in sizes]
    return [255 * (picture > 127).to(torch.uint8) if i % 2 else picture for i, picture in enumerate(noise)]


def call_of(
    sizes: list[tuple[int, int, int, int]], seed: int, dtype: torch.dtype, bilinear: bool
) -> tuple[Call, Tensor]:
    """The call, and what the op's declaration gives."""
    images, targets = pictures(sizes, seed), [side for _, _, rows, columns in sizes for side in (rows, columns)]
    numbers = {"images": len(sizes), "bilinear": int(bilinear), "bf16": int(dtype == torch.bfloat16)}
    buffers = {"levels": values(dtype).float()}
    for i, (image, (height, width, rows, columns)) in enumerate(zip(images, sizes, strict=True)):
        numbers |= {f"height{i}": height, f"width{i}": width, f"rows{i}": rows, f"columns{i}": columns}
        numbers[f"row_stride{i}"] = 3 * width
        buffers[f"image{i}"] = image
    with ops.use_backends("eager"):
        truth = ops.pack_patches(images, targets, MEAN, STD, bilinear, PATCH, dtype)
    buffers["out"] = torch.full_like(truth, torch.nan)
    return Call("pack_patches", numbers, buffers), truth


@pytest.mark.parametrize("bilinear", [False, True], ids=["bicubic", "bilinear"])
@pytest.mark.parametrize("seed", [1, 2])
def test_equals_the_declaration(program: Path, seed: int, bilinear: bool, tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    calls = [call_of(sizes, seed, dtype, bilinear) for sizes in BATCHES.values() for dtype in dtypes]
    found = harness.run(program, seed, [call for call, _ in calls], tmp_path / "calls")
    for (call, truth), buffers in zip(calls, found, strict=True):
        assert torch.equal(buffers["out"], truth), call.numbers


def packed_by_pillow(picture: Tensor, rows: int, columns: int) -> Tensor:
    array = Image.fromarray(picture.numpy()).resize((columns, rows), Image.Resampling.BICUBIC)
    levels = torch.from_numpy(numpy.asarray(array).copy()).long()
    patches = levels.view(rows // PATCH, PATCH, columns // PATCH, PATCH, 3).permute(0, 2, 4, 1, 3).reshape(-1, DIM)
    return values(torch.float32)[torch.arange(DIM) // (PATCH * PATCH), patches]


def test_random_sizes_equal_pillow(cuda_builds: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(1, 120, (24, 2), generator=generator)
    targets = PATCH * torch.randint(1, 6, (24, 2), generator=generator)
    sizes = [(*side, *target) for side, target in zip(sides.tolist(), targets.tolist(), strict=True)]
    call, _ = call_of(sizes, 0, torch.float32, bilinear=False)
    [found] = harness.run(harness.build("asan", cuda_builds), 5, [call], tmp_path / "call")
    expected = [
        packed_by_pillow(call.buffers[f"image{i}"], rows, columns) for i, (_, _, rows, columns) in enumerate(sizes)
    ]
    assert torch.equal(found["out"], torch.cat(expected))


def test_rows_that_lie_apart(program: Path, tmp_path: Path) -> None:
    """A crop of a larger picture, in a buffer that ends with the crop's last pixel."""
    call, truth = call_of([(20, 30, 28, 28)], 1, torch.float32, bilinear=False)
    whole = torch.zeros(20, 47, 3, dtype=torch.uint8)
    whole[:, :30] = call.buffers["image0"]
    numbers = {**call.numbers, "row_stride0": 3 * 47}
    crop = whole.view(-1)[: 19 * 3 * 47 + 3 * 30]
    [found] = harness.run(program, 1, [Call(call.name, numbers, {**call.buffers, "image0": crop})], tmp_path / "call")
    assert torch.equal(found["out"], truth)


def test_the_longest_sides(cuda_builds: Path, tmp_path: Path) -> None:
    """Sums of 1859 weights, and 175 chunks of input rows."""
    call, truth = call_of([(20, 13000, 14, 28), (5600, 3, 14, 14)], 0, torch.bfloat16, bilinear=False)
    [found] = harness.run(harness.build("asan", cuda_builds), 1, [call], tmp_path / "call")
    assert torch.equal(found["out"], truth)


@pytest.mark.parametrize("wait", harness.waits(SOURCE))
def test_every_wait_is_needed(wait: str, races: Path, tmp_path: Path) -> None:
    """One left out in turn: the race checker names the memory that is no longer ordered."""
    call, _ = call_of([(100, 30, 14, 28)], 1, torch.float32, bilinear=False)  # several chunks of input rows
    harness.check_wait(races, [call], tmp_path, wait)


@pytest.mark.parametrize("plant", plants.VISION, ids=lambda plant: plant.name)
def test_planted_overruns_are_caught(plant: Plant, asan: Path, tmp_path: Path) -> None:
    call, _ = call_of([(rows, 28, 28, 28) for rows in (29, 30, 31)], 1, torch.float32, bilinear=False)
    harness.check_plant(asan, [call], tmp_path, plant)

"""Patches of the vision tower: from pixels, position table, merging. Grids are lists of (t, rows, columns) triples."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from kvkeye.ops._autograd import wide
from kvkeye.ops._op import op
from kvkeye.ops._resample import resized

_LONGEST_SIDE = 1 << 24


def triples(grid_thw: list[int]) -> list[tuple[int, int, int]]:
    """[(t, rows, columns)] of a flat list."""
    return [(grid_thw[i], grid_thw[i + 1], grid_thw[i + 2]) for i in range(0, len(grid_thw), 3)]


def _triples_fit(grid_thw: list[int]) -> Iterator[str]:
    if len(grid_thw) % 3 or any(g < 1 for g in grid_thw):
        yield f"grid_thw {list(grid_thw)[:12]} must be flat triples (t, rows, columns) of positive sizes"


def _table_is_square(table: Tensor, grid_thw: list[int]) -> Iterator[str]:
    if table.dim() != 3 or table.shape[0] != table.shape[1]:
        yield f"table is {tuple(table.shape)}; expected [n, n, d]"
    yield from _triples_fit(grid_thw)


@op(requires=_table_is_square)
def interpolate_position(table: Tensor, grid_thw: list[int]) -> Tensor:
    """The learned position table resized to each picture's grid, rows of all pictures packed.

    Bilinear, half-pixel centres, no antialiasing, also when shrinking: source s = max(0, (o + 0.5) n / size - 0.5).
    The same rows repeat for each of the t frames.

    Shapes     table [n, n, d]; out [sum t rows columns, d], raster order within a frame
    Args       table fp32 | bf16 | fp16;  grid_thw flat triples, on the host
    Returns    dtype of table
    Numerics   fp32 weights and sums, one rounding at the end
    Gradient   table
    Errors     ValueError on shape disagreement
    Source     Keye-VL technical report, section 2 (native-resolution encoder)
    """
    image = wide(table).permute(2, 0, 1)[None]  # [1, d, n, n]
    rows = []
    for t, height, width in triples(grid_thw):
        resized = torch.nn.functional.interpolate(image, size=(height, width), mode="bilinear", align_corners=False)
        rows.append(resized[0].permute(1, 2, 0).reshape(height * width, -1).repeat(t, 1))  # [t rows columns, d]
    return torch.cat(rows).to(table.dtype) if rows else table.new_empty((0, table.shape[-1]))


interpolate_position.implement("cpp")
interpolate_position.implement("triton", "vision:interpolate_position")
interpolate_position_backward = interpolate_position.differentiate("table")
interpolate_position_backward.implement("cpp")
interpolate_position_backward.implement("triton", "vision:interpolate_position_backward")


def _rows_fit(x: Tensor, grid_thw: list[int], merge: int) -> Iterator[str]:
    yield from _triples_fit(grid_thw)
    if x.dim() != 2 or merge < 1:
        yield f"x is {tuple(x.shape)} and merge {merge}; expected [N, d] and merge >= 1"
        return
    if any(h % merge or w % merge for _, h, w in triples(grid_thw)):
        yield f"every grid side must be a multiple of merge = {merge}, got {triples(grid_thw)}"
    if (rows := sum(t * h * w for t, h, w in triples(grid_thw))) != x.shape[0]:
        yield f"x has {x.shape[0]} rows; grid_thw counts {rows}"


def _merged_rows_fit(grad: Tensor, grid_thw: list[int], merge: int) -> Iterator[str]:
    if grad.dim() != 2 or merge < 1 or grad.shape[1] % (merge * merge):
        yield f"grad is {tuple(grad.shape)}; expected [N / merge^2, merge^2 d] with merge = {merge}"
    yield from _triples_fit(grid_thw)


@op(requires=_rows_fit)
def merge_patches(x: Tensor, grid_thw: list[int], merge: int) -> Tensor:
    """Concatenates the rows of each merge x merge window of patches.

    A window's rows follow in raster order, windows in raster order within a frame.

    Shapes     x [N, d] raster order -> [N / merge^2, merge^2 d]
    Args       x any floating dtype;  grid_thw flat triples, on the host
    Returns    dtype of x
    Numerics   data movement, exact
    Gradient   x
    Errors     ValueError on shape disagreement or an odd grid
    Source     Keye-VL technical report, section 2 (projector)
    """
    merged, start = [], 0
    for t, height, width in triples(grid_thw):
        frame = x[start : start + t * height * width]
        start += t * height * width
        windows = frame.view(t, height // merge, merge, width // merge, merge, -1).transpose(2, 3)
        merged.append(windows.reshape(-1, merge * merge * x.shape[1]))  # [windows, merge^2 d]
    return torch.cat(merged) if merged else x.new_empty((0, merge * merge * x.shape[1]))


@op(requires=_merged_rows_fit)
def merge_patches_backward(grad: Tensor, grid_thw: list[int], merge: int) -> Tensor:
    """Gradient of merge_patches with respect to x: the inverse permutation, [N / merge^2, merge^2 d] -> [N, d]."""
    rows, start = [], 0
    for t, height, width in triples(grid_thw):
        count = t * height * width // (merge * merge)
        windows = grad[start : start + count]
        start += count
        frame = windows.view(t, height // merge, width // merge, merge, merge, -1).transpose(2, 3)
        rows.append(frame.reshape(t * height * width, -1))
    return torch.cat(rows) if rows else grad.new_empty((0, grad.shape[1] // (merge * merge)))


merge_patches.implement("cpp")
merge_patches.implement("triton", "vision:merge_patches")
merge_patches.differentiate("x", backward=merge_patches_backward, save=("grid_thw", "merge"))
merge_patches_backward.implement("cpp")
merge_patches_backward.implement("triton", "vision:merge_patches_backward")


def _picture_fits(image: Tensor) -> Iterator[str]:
    if image.dtype != torch.uint8 or image.dim() != 3 or image.shape[2] != 3:
        yield f"an image is {tuple(image.shape)}, {image.dtype}; expected uint8 [height, width, 3]"
    elif not all(1 <= side <= _LONGEST_SIDE for side in image.shape[:2]):
        yield f"an image is {tuple(image.shape)}; its sides must be from 1 to {_LONGEST_SIDE}"


def _pictures_fit(
    images: list[Tensor],
    sizes: list[int],
    mean: list[float],
    std: list[float],
    bilinear: bool,
    patch_size: int,
    dtype: torch.dtype,
) -> Iterator[str]:
    if not images or len(sizes) != 2 * len(images):
        yield f"{len(images)} images and {len(sizes)} numbers in sizes; expected (rows, columns) of at least one image"
    for image in images:
        yield from _picture_fits(image)
    if patch_size < 1 or any(s < 1 or s % patch_size or s > _LONGEST_SIDE for s in sizes):
        yield f"sizes {list(sizes)[:12]} must be positive multiples of patch_size = {patch_size}, itself at least 1"
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, [*mean, *std])) or min(std) <= 0:
        yield f"mean {list(mean)} and std {list(std)}; expected three finite numbers each, std above 0"
    if dtype not in (torch.float32, torch.bfloat16):
        yield f"dtype is {dtype}; expected float32 or bfloat16"


@op(requires=_pictures_fit)
def pack_patches(
    images: list[Tensor],
    sizes: list[int],
    mean: list[float],
    std: list[float],
    bilinear: bool,
    patch_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Pictures of any sizes to the tower's input: resized, normalised, cut into patches, packed.

    A picture that has its target size is not resampled. Otherwise antialiased, horizontally first, rounded to 8 bits
    after each pass: bicubic gives the levels of Pillow below version 13 (which turns the order for pictures over 100
    times taller than wide; here it never turns), bilinear those of torch's uint8 interpolation.

    Shapes     images [height, width, 3] each  -> [sum (rows / patch) (columns / patch), 3 patch^2],
               a patch in (channel, row, column) order, patches in raster order
    Args       images uint8, one device;  sizes flat (rows, columns) per image, multiples of patch_size
               mean, std per channel, on the scale of 0 to 1;  dtype fp32 | bf16
    Returns    dtype
    Numerics   (level / 255 - mean) / std in fp32, rounded once to dtype
    Gradient   none (inference only)
    Errors     ValueError on shape, size or dtype disagreement
    Source     Keye-VL technical report, section 2; Pillow's and PyTorch's resampling rules
    """
    levels = torch.arange(256, dtype=torch.float32)
    values = (levels / 255 - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]  # [3, 256]
    values = values.to(dtype).to(images[0].device)
    channels = torch.arange(3, device=values.device)
    packed = []
    for i, image in enumerate(images):
        rows, columns = sizes[2 * i], sizes[2 * i + 1]
        normalised = values[channels, resized(image, rows, columns, bilinear).long()]  # [rows, columns, 3]
        cut = normalised.view(rows // patch_size, patch_size, columns // patch_size, patch_size, 3)
        packed.append(cut.permute(0, 2, 4, 1, 3).reshape(-1, 3 * patch_size**2))
    return torch.cat(packed)


@pack_patches.fake
def _(
    images: list[Tensor],
    sizes: list[int],
    mean: list[float],
    std: list[float],
    bilinear: bool,
    patch_size: int,
    dtype: torch.dtype,
) -> Tensor:
    patches = sum(sizes[i] * sizes[i + 1] for i in range(0, len(sizes), 2)) // patch_size**2
    return images[0].new_empty((patches, 3 * patch_size**2), dtype=dtype)


def _patch_is_not_14(images: list[Tensor], *rest: Any) -> Iterator[str]:
    if (patch_size := rest[-2]) != 14:
        yield f"patch_size is {patch_size}; the GPU kernel is made for 14"


pack_patches.implement("cpp")
pack_patches.implement("cuda", refuses=_patch_is_not_14)


def _size_fits(image: Tensor, rows: int, columns: int, bilinear: bool) -> Iterator[str]:
    yield from _picture_fits(image)
    if not (1 <= rows <= _LONGEST_SIDE and 1 <= columns <= _LONGEST_SIDE):
        yield f"the size is {rows} x {columns}; sides must be from 1 to {_LONGEST_SIDE}"


@op(requires=_size_fits)
def resize_image(image: Tensor, rows: int, columns: int, bilinear: bool) -> Tensor:
    """One picture at another size, by the rule of `pack_patches`.

    Shapes     image [height, width, 3] -> [rows, columns, 3]
    Args       image uint8
    Returns    uint8
    Numerics   exact: Pillow's levels (bicubic), torch's uint8 levels (bilinear)
    Gradient   none (inference only)
    Errors     ValueError on shape or dtype disagreement
    Source     as `pack_patches`
    """
    return resized(image, rows, columns, bilinear).to(torch.uint8)


@resize_image.fake
def _(image: Tensor, rows: int, columns: int, bilinear: bool) -> Tensor:
    return image.new_empty((rows, columns, 3))


resize_image.implement("cpp")

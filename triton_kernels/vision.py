"""Patches of the vision tower: position table and merging. One launch per run of pictures with equal grids.

Grid sizes arrive as plain integers, so nothing is copied to the device. Gradients are gathered, never scattered:
each table cell sums the patches that read it, in raster order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import as_rows, lanes_for, launch, warps_for
from .common.refusals import interpreted_bf16

_BLOCK = 256
_BWD_BLOCK = 128
_CELLS = 16


def _runs(grid_thw: list[int]) -> Iterator[tuple[int, int, int, int]]:
    """(first row, frames, rows, columns): neighbours with equal grids are taken as one longer clip."""
    start, frames, size = 0, 0, (1, 1)
    for i in range(0, len(grid_thw), 3):
        t, height, width = grid_thw[i : i + 3]
        if (height, width) != size:
            if frames:
                yield start, frames, *size
            start, frames, size = start + frames * size[0] * size[1], 0, (height, width)
        frames += t
    if frames:
        yield start, frames, *size


@triton.jit
def _source(place, size, N: tl.constexpr):
    """Lower and upper table index of output `place`, and the upper one's weight; exact until the last division."""
    # s = max(0, (place + 1/2) N / size - 1/2) over the common denominator 2 size.
    numerator = tl.maximum((2 * place + 1) * N - size, 0)
    low = numerator // (2 * size)
    weight = (numerator - low * 2 * size).to(tl.float32) / (2 * size).to(tl.float32)
    return low, tl.minimum(low + 1, N - 1), weight


@triton.jit(do_not_specialize=["height", "width", "frames", "start"])
def _interpolate_position_fwd_kernel(
    table_ptr, out_ptr, start, frames, height, width, N: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr
):
    patch = tl.program_id(0)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < D
    top, bottom, down = _source(patch // width, height, N)
    left, right, across = _source(patch % width, width, N)
    a = tl.load(table_ptr + (top * N + left) * D + lanes, mask, other=0.0).to(tl.float32)
    b = tl.load(table_ptr + (top * N + right) * D + lanes, mask, other=0.0).to(tl.float32)
    c = tl.load(table_ptr + (bottom * N + left) * D + lanes, mask, other=0.0).to(tl.float32)
    d = tl.load(table_ptr + (bottom * N + right) * D + lanes, mask, other=0.0).to(tl.float32)
    value = (1.0 - down) * ((1.0 - across) * a + across * b) + down * ((1.0 - across) * c + across * d)
    for frame in range(0, frames):
        row = (start + frame * height * width + patch).to(tl.int64)
        tl.store(out_ptr + row * D + lanes, value, mask)


@triton.jit
def _first_reader(cell, size, N: tl.constexpr):
    """The first output whose source may reach `cell`: sources above cell - 1, one output early to be safe."""
    return tl.maximum(((2 * cell - 1) * size - N) // (2 * N) - 1, 0)


@triton.jit
def _end_of_readers(cell, size, N: tl.constexpr):
    """One past the last output whose source may reach `cell`; all outputs past the last centre read cell N - 1."""
    end = ((2 * cell + 3) * size - N) // (2 * N) + 2
    return tl.where(cell == N - 1, size, tl.minimum(end, size))


@triton.jit
def _share(place, cell, size, N: tl.constexpr):
    """The weight with which output `place` reads `cell`."""
    low, high, weight = _source(place, size, N)
    return tl.where(low == cell, 1.0 - weight, 0.0) + tl.where(high == cell, weight, 0.0)


@triton.jit(do_not_specialize=["height", "width", "frames", "start"])
def _interpolate_position_bwd_kernel(
    grad_ptr, sums_ptr, stride_grad, start, frames, height, width,
    N: tl.constexpr, D: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, first = tl.program_id(0), tl.program_id(1) * CELLS
    columns = first + tl.arange(0, CELLS)[:, None]  # [CELLS, 1] of one table row
    lanes = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[None, :]
    cells = sums_ptr + (row * N + columns) * D + lanes
    mask = (columns < N) & (lanes < D)
    total = tl.load(cells, mask, other=0.0)
    end = _end_of_readers(tl.minimum(first + CELLS, N) - 1, width, N)
    for start_x in range(_first_reader(first, width, N), end, CELLS):
        x = start_x + tl.arange(0, CELLS)
        inside = (x < end)[:, None] & (lanes < D)
        strip = tl.zeros([CELLS, BLOCK], tl.float32)  # what these columns give to the table row
        for y in range(_first_reader(row, height, N), _end_of_readers(row, height, N)):
            share_y = _share(y, row, height, N)
            for frame in range(0, frames):
                patches = (start + (frame * height + y) * width + x).to(tl.int64)[:, None]
                strip += share_y * tl.load(grad_ptr + patches * stride_grad + lanes, inside, other=0.0).to(tl.float32)
        total = tl.dot(_share(x[None, :], columns, width, N), strip, total, input_precision="ieee")
    tl.store(cells, total, mask)


def _columns(width: int) -> tuple[int, dict[str, int]]:
    """Programs per row, and their constants."""
    block = min(_BLOCK, lanes_for(width))
    return triton.cdiv(width, block), {"D": width, "BLOCK": block, "num_warps": warps_for(4 * block)}


interpolate_position_refuses = interpreted_bf16


def interpolate_position(table: Tensor, grid_thw: list[int]) -> Tensor:
    """See kvkeye.ops.interpolate_position."""
    size, width = table.shape[0], table.shape[2]
    cells = table.contiguous()
    num_rows = sum(t * h * w for t, h, w in zip(*[iter(grid_thw)] * 3))
    out = torch.empty((num_rows, width), dtype=table.dtype, device=table.device)
    columns, constants = _columns(width)
    for start, frames, rows, cols in _runs(grid_thw):
        launch(
            _interpolate_position_fwd_kernel, (rows * cols, columns), cells, out, start, frames, rows, cols,
            N=size, **constants,
        )  # fmt: skip
    return out


interpolate_position_backward_refuses = interpreted_bf16


def interpolate_position_backward(grad: Tensor, table: Tensor, grid_thw: list[int]) -> Tensor:
    """Gradient of interpolate_position: table. Pictures are added one after the other, in fp32."""
    size, width = table.shape[0], table.shape[2]
    grads = as_rows(grad)
    sums = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    grid = (size, triton.cdiv(size, _CELLS), triton.cdiv(width, _BWD_BLOCK))
    for start, frames, rows, cols in _runs(grid_thw):
        launch(
            _interpolate_position_bwd_kernel, grid, grads, sums, grads.stride(0), start, frames, rows, cols,
            N=size, D=width, CELLS=_CELLS, BLOCK=_BWD_BLOCK, num_warps=4,
        )  # fmt: skip
    return sums.to(table.dtype)


@triton.jit(do_not_specialize=["width", "start"])
def _merge_patches_kernel(
    source_ptr, out_ptr, stride_source, start, width,
    INVERSE: tl.constexpr, MERGE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    patch = tl.program_id(0)
    lanes = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row, column = patch // width, patch % width  # rows run on through the frames, whose height MERGE divides
    window = (row // MERGE) * (width // MERGE) + column // MERGE
    part = (row % MERGE) * MERGE + column % MERGE
    place = (start + patch).to(tl.int64)
    merged = (start // (MERGE * MERGE) + window).to(tl.int64)
    if INVERSE:
        value = tl.load(source_ptr + merged * stride_source + part * D + lanes, lanes < D, other=0.0)
        tl.store(out_ptr + place * D + lanes, value, lanes < D)
    else:
        value = tl.load(source_ptr + place * stride_source + lanes, lanes < D, other=0.0)
        tl.store(out_ptr + (merged * MERGE * MERGE + part) * D + lanes, value, lanes < D)


def _merge(source: Tensor, out: Tensor, width: int, grid_thw: list[int], merge: int, inverse: bool) -> Tensor:
    rows = as_rows(source)
    columns, constants = _columns(width)
    for start, frames, height, cols in _runs(grid_thw):
        launch(
            _merge_patches_kernel, (frames * height * cols, columns), rows, out, rows.stride(0), start, cols,
            INVERSE=inverse, MERGE=merge, **constants,
        )  # fmt: skip
    return out


def merge_patches(x: Tensor, grid_thw: list[int], merge: int) -> Tensor:
    """See kvkeye.ops.merge_patches."""
    shape = (x.shape[0] // (merge * merge), merge * merge * x.shape[1])
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    return _merge(x, out, x.shape[1], grid_thw, merge, False)


def merge_patches_backward(grad: Tensor, grid_thw: list[int], merge: int) -> Tensor:
    """Gradient of merge_patches: x, by the inverse permutation."""
    width = grad.shape[1] // (merge * merge)
    dx = torch.empty((grad.shape[0] * merge * merge, width), dtype=grad.dtype, device=grad.device)
    return _merge(grad, dx, width, grid_thw, merge, True)

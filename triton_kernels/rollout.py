"""Scores of candidates: one program per frame and channel pools, compares and forgets; sums over channels follow."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common.launch import lanes_for, launch
from .common.refusals import MAX_GRID_YZ, interpreted_bf16

_MAX_CELL = 4096
_TERMS = tl.constexpr(5)


@triton.jit
def _cell(cell, height, width, GRID: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(offsets, mask) of a cell's elements [ROWS, COLUMNS] in a plane, and how many there are."""
    i, j = cell // GRID, cell % GRID
    top, bottom = i * height // GRID, (i + 1) * height // GRID
    left, right = j * width // GRID, (j + 1) * width // GRID
    rows, columns = top + tl.arange(0, ROWS)[:, None], left + tl.arange(0, COLUMNS)[None, :]
    return rows * width + columns, (rows < bottom) & (columns < right), (bottom - top) * (right - left)


@triton.jit
def _centred(means, cells, GRID: tl.constexpr):
    """Cell means less their mean, zero behind the last."""
    return tl.where(cells < GRID * GRID, means - tl.sum(means, 0) / (GRID * GRID), 0.0)


@triton.jit
def _pool_guide_kernel(
    guide_ptr, pooled_ptr, height, width,
    GRID: tl.constexpr, CELLS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """pooled [C, CELLS + 1]: centred cell means of one channel, and the plane's mean."""
    channel, cells = tl.program_id(0), tl.arange(0, CELLS)
    plane, total, means = channel * height * width, 0.0, tl.zeros([CELLS], tl.float32)
    for cell in range(0, GRID * GRID):
        offsets, mask, count = _cell(cell, height, width, GRID, ROWS, COLUMNS)
        found = tl.sum(tl.sum(tl.load(guide_ptr + plane + offsets, mask, other=0.0), 1), 0)
        means = tl.where(cells == cell, found / count, means)
        total += found
    out = pooled_ptr + channel * (CELLS + 1)
    tl.store(out + cells, _centred(means, cells, GRID))
    tl.store(out + CELLS, total / (height * width))


@triton.jit
def _score_planes_kernel(
    x_ptr, v_ptr, guide_ptr, pooled_ptr, parts_ptr, sigma, num_channels, num_frames, height, width,
    GRID: tl.constexpr, CELLS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """parts [N, T, 5, C]: own.guide, own.own, guide.guide, sum |motion|, (mean - guide's mean)^2 of one channel."""
    size, cells = height * width, tl.arange(0, CELLS)
    item, frame, channel = tl.program_id(1), tl.program_id(0) // num_channels, tl.program_id(0) % num_channels
    plane = ((item * num_channels + channel) * num_frames + frame).to(tl.int64) * size
    total, moved, means = 0.0, 0.0, tl.zeros([CELLS], tl.float32)
    before_ends = tl.where(frame == 0, 0, size)  # of the offsets for which a frame before exists
    for cell in range(0, GRID * GRID):
        offsets, mask, count = _cell(cell, height, width, GRID, ROWS, COLUMNS)
        x = tl.load(x_ptr + plane + offsets, mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + plane + offsets, mask, other=0.0).to(tl.float32)
        clean = tl.fma(v, -sigma, x)
        earlier = mask & (offsets < before_ends)
        x = tl.load(x_ptr + plane - size + offsets, earlier, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + plane - size + offsets, earlier, other=0.0).to(tl.float32)
        guide = tl.load(guide_ptr + channel * size + offsets, mask & (offsets >= before_ends), other=0.0)
        moved += tl.sum(tl.sum(tl.abs(clean - tl.fma(v, -sigma, x) - guide), 1), 0)
        found = tl.sum(tl.sum(clean, 1), 0)
        means = tl.where(cells == cell, found / count, means)
        total += found
    own, wanted = _centred(means, cells, GRID), tl.load(pooled_ptr + channel * (CELLS + 1) + cells)
    shift = total / size - tl.load(pooled_ptr + channel * (CELLS + 1) + CELLS)
    out = parts_ptr + (item * num_frames + frame) * _TERMS * num_channels + channel
    tl.store(out, tl.sum(own * wanted, 0))
    tl.store(out + num_channels, tl.sum(own * own, 0))
    tl.store(out + 2 * num_channels, tl.sum(wanted * wanted, 0))
    tl.store(out + 3 * num_channels, moved)
    tl.store(out + 4 * num_channels, shift * shift)


@triton.jit
def _score_terms_kernel(
    parts_ptr, similarity_ptr, motion_ptr, drift_ptr, num_channels, plane_size, CHANNELS: tl.constexpr
):
    row, lanes = tl.program_id(0), tl.arange(0, CHANNELS)
    parts = parts_ptr + row * _TERMS * num_channels + lanes
    mask = lanes < num_channels
    along = tl.sum(tl.load(parts, mask, other=0.0), 0)
    own = tl.sum(tl.load(parts + num_channels, mask, other=0.0), 0)
    target = tl.sum(tl.load(parts + 2 * num_channels, mask, other=0.0), 0)
    norms = tl.sqrt(own) * tl.sqrt(target)
    tl.store(similarity_ptr + row, tl.where(norms > 0.0, along / tl.where(norms > 0.0, norms, 1.0), along))
    moved = tl.sum(tl.load(parts + 3 * num_channels, mask, other=0.0), 0)
    tl.store(motion_ptr + row, moved / (num_channels * plane_size))
    drifted = tl.sum(tl.load(parts + 4 * num_channels, mask, other=0.0), 0)
    tl.store(drift_ptr + row, tl.sqrt(drifted / num_channels))


def _cell_sides(guide: Tensor, grid: int) -> tuple[int, int]:
    rows, columns = (triton.next_power_of_2(triton.cdiv(size, grid) + 1) for size in guide.shape[1:])
    return rows, columns


def score_candidates_refuses(x: Tensor, v: Tensor, sigma: float, guide: Tensor, grid: int) -> Iterator[str]:
    yield from interpreted_bf16(x, v)
    rows, columns = _cell_sides(guide, grid)
    if rows * columns > _MAX_CELL:
        yield f"cells of {rows} by {columns} elements; a program holds at most {_MAX_CELL}: ask for a finer grid"
    if x.shape[0] > MAX_GRID_YZ:
        yield f"{x.shape[0]} candidates; a CUDA grid takes at most {MAX_GRID_YZ}"


def score_candidates(x: Tensor, v: Tensor, sigma: float, guide: Tensor, grid: int) -> tuple[Tensor, Tensor, Tensor]:
    """See kvkeye.ops.score_candidates."""
    x, v, guide = x.contiguous(), v.contiguous(), guide.contiguous()
    count, channels, frames, height, width = x.shape
    rows, columns = _cell_sides(guide, grid)
    sizes = {"GRID": grid, "CELLS": lanes_for(grid * grid), "ROWS": rows, "COLUMNS": columns, "num_warps": 4}
    fp32 = {"dtype": torch.float32, "device": x.device}
    pooled = torch.empty((channels, sizes["CELLS"] + 1), **fp32)
    parts = torch.empty((count, frames, 5, channels), **fp32)
    similarity, motion, drift = (torch.empty((count, frames), **fp32) for _ in range(3))
    launch(_pool_guide_kernel, (channels,), guide, pooled, height, width, **sizes)
    launch(
        _score_planes_kernel, (frames * channels, count), x, v, guide, pooled, parts, float(sigma), channels, frames,
        height, width, **sizes,
    )  # fmt: skip
    launch(
        _score_terms_kernel, (count * frames,), parts, similarity, motion, drift, channels, height * width,
        CHANNELS=lanes_for(channels), num_warps=1,
    )  # fmt: skip
    return similarity, motion, drift

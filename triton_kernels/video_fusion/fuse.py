"""Fusion of overlapping tiles: one program per piece of a plane of one frame, which gathers the frame's tiles.

Tiles are visited in the order of their starts, whatever their order in memory. No atomics, no scratch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import lanes_for, launch, warps_for
from ..common.refusals import interpreted_bf16

_BLOCK = 1024


@triton.jit
def _branches(outputs_ptr, offsets, stride_branch, guidance, mask, GUIDED: tl.constexpr):
    """The guided output in fp32."""
    value = tl.load(outputs_ptr + offsets, mask, other=0.0).to(tl.float32)
    if GUIDED:
        other = tl.load(outputs_ptr + stride_branch + offsets, mask, other=0.0).to(tl.float32)
        value = tl.fma(other - value, guidance, value)
    return value


@triton.jit
def _place(frame, start, num_frames):
    """Where the frame stands in the tile that starts at `start`, modulo the video."""
    place = (frame - start) % num_frames
    return tl.where(place < 0, place + num_frames, place)


@triton.jit(do_not_specialize=["num_tiles", "num_frames"])
def _fuse_tiles_fwd_kernel(
    outputs_ptr, starts_ptr, order_ptr, weights_ptr, latent_ptr, out_ptr, guidance, step, num_tiles, num_channels,
    num_frames, plane, stride_branch,
    LENGTH: tl.constexpr, GUIDED: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    channel, frame = tl.program_id(1) // num_frames, tl.program_id(1) % num_frames
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = lanes < plane
    total = tl.zeros([BLOCK], tl.float32)
    for i in range(0, num_tiles):
        tile = tl.load(order_ptr + i)
        place = _place(frame, tl.load(starts_ptr + tile), num_frames)
        if place < LENGTH:
            row = ((tile * num_channels + channel) * LENGTH + place).to(tl.int64)
            value = _branches(outputs_ptr, row * plane + lanes, stride_branch, guidance, mask, GUIDED)
            total = tl.fma(value, tl.load(weights_ptr + tile * LENGTH + place), total)
    at = tl.program_id(1).to(tl.int64) * plane + lanes
    if STATE:
        total = tl.load(latent_ptr + at, mask, other=0.0) + total * step
    tl.store(out_ptr + at, total, mask)


@triton.jit(do_not_specialize=["num_frames"])
def _fuse_tiles_bwd_kernel(
    grad_ptr, outputs_ptr, starts_ptr, weights_ptr, doutputs_ptr, dweights_ptr, guidance, step, num_channels,
    num_frames, plane, stride_branch,
    LENGTH: tl.constexpr, GUIDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tile, place = tl.program_id(0) // LENGTH, tl.program_id(0) % LENGTH
    frame = (tl.load(starts_ptr + tile) + place) % num_frames
    frame = tl.where(frame < 0, frame + num_frames, frame)
    scale = tl.load(weights_ptr + tl.program_id(0)) * step
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for channel in range(0, num_channels):
        row = ((tile * num_channels + channel) * LENGTH + place).to(tl.int64) * plane
        grad_row = (channel * num_frames + frame).to(tl.int64) * plane
        for first in range(0, plane, BLOCK):
            mask = first + lanes < plane
            grad = tl.load(grad_ptr + grad_row + first + lanes, mask, other=0.0)
            value = _branches(outputs_ptr, row + first + lanes, stride_branch, guidance, mask, GUIDED)
            total = tl.fma(grad, value, total)
            if GUIDED:
                tl.store(doutputs_ptr + row + first + lanes, grad * (scale * (1.0 - guidance)), mask)
                tl.store(doutputs_ptr + stride_branch + row + first + lanes, grad * (scale * guidance), mask)
            else:
                tl.store(doutputs_ptr + row + first + lanes, grad * scale, mask)
    tl.store(dweights_ptr + tl.program_id(0), tl.sum(total, 0) * step)


def _fuse(
    outputs: Tensor, starts: Tensor, weights: Tensor, latent: Tensor | None, num_frames: int, guidance: float,
    step: float,
) -> Tensor:  # fmt: skip
    outputs, weights = outputs.contiguous(), weights.contiguous()
    branches, tiles, channels, length, height, width = outputs.shape
    out = torch.empty((channels, num_frames, height, width), dtype=torch.float32, device=outputs.device)
    order = torch.argsort(starts % num_frames) if tiles else starts
    block = min(_BLOCK, lanes_for(height * width))
    launch(
        _fuse_tiles_fwd_kernel, (triton.cdiv(height * width, block), channels * num_frames),
        outputs, starts.contiguous(), order, weights, out if latent is None else latent.contiguous(), out,
        float(guidance), float(step), tiles, channels, num_frames, height * width, outputs.numel() // branches,
        LENGTH=length, GUIDED=branches == 2, STATE=latent is not None, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return out


def _fuse_backward(
    grad: Tensor, outputs: Tensor, starts: Tensor, weights: Tensor, num_frames: int, guidance: float, step: float
) -> tuple[Tensor, Tensor]:
    outputs = outputs.contiguous()
    branches, tiles, channels, length, height, width = outputs.shape
    doutputs = torch.empty(outputs.shape, dtype=outputs.dtype, device=outputs.device)
    dweights = torch.empty(weights.shape, dtype=weights.dtype, device=weights.device)
    block = min(_BLOCK, lanes_for(height * width))
    launch(
        _fuse_tiles_bwd_kernel, (tiles * length,), grad.contiguous(), outputs, starts.contiguous(),
        weights.contiguous(), doutputs, dweights, float(guidance), float(step), channels, num_frames, height * width,
        outputs.numel() // branches, LENGTH=length, GUIDED=branches == 2, BLOCK=block, num_warps=warps_for(block),
    )  # fmt: skip
    return doutputs, dweights


blend_tiles_refuses = fuse_tiles_refuses = interpreted_bf16
blend_tiles_backward_refuses = fuse_tiles_backward_refuses = interpreted_bf16


def blend_tiles(outputs: Tensor, starts: Tensor, weights: Tensor, num_frames: int, guidance: float) -> Tensor:
    """See kvkeye.ops.blend_tiles."""
    return _fuse(outputs, starts, weights, None, num_frames, guidance, 1.0)


def blend_tiles_backward(
    grad: Tensor, outputs: Tensor, starts: Tensor, weights: Tensor, num_frames: int, guidance: float
) -> tuple[Tensor, Tensor]:
    """Gradients of blend_tiles: outputs, weights."""
    return _fuse_backward(grad, outputs, starts, weights, num_frames, guidance, 1.0)


def fuse_tiles(
    outputs: Tensor, starts: Tensor, weights: Tensor, latent: Tensor, guidance: float, dsigma: float
) -> Tensor:
    """See kvkeye.ops.fuse_tiles."""
    return _fuse(outputs, starts, weights, latent, latent.shape[1], guidance, dsigma)


def fuse_tiles_backward(
    grad: Tensor, outputs: Tensor, starts: Tensor, weights: Tensor, latent: Tensor, guidance: float, dsigma: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of fuse_tiles: outputs, weights, latent."""
    doutputs, dweights = _fuse_backward(grad, outputs, starts, weights, latent.shape[1], guidance, dsigma)
    return doutputs, dweights, grad.clone(memory_format=torch.contiguous_format)

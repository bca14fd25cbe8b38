"""Tiles of a token by slots: slot i is the tile in which the token's frame stands at place i, if there is one.

Starts differ, so a slot holds at most one tile, and whether the tile of slot i holds another frame follows from the
distance of the frames alone. Text is the frame after the last: one slot, everything seen, weight one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention.lanes import lane_constants
from ..common.refusals import MAX_GRID_YZ, interpreted_bf16

MAX_HEAD_DIM = 256
MAX_LENGTH = 64


def tiles_refuse(q: Tensor, weights: Tensor, *floating: Tensor) -> Iterator[str]:
    """What both directions refuse."""
    yield from interpreted_bf16(q, *floating)
    if q.shape[3] > MAX_HEAD_DIM:
        yield f"D is {q.shape[3]}; a tile holds at most {MAX_HEAD_DIM} columns"
    if weights.shape[1] > MAX_LENGTH:
        yield f"tiles have {weights.shape[1]} frames; a program follows at most {MAX_LENGTH} tiles of a frame"
    if max(q.shape[0], q.shape[2]) > MAX_GRID_YZ:
        yield f"{q.shape[0]} sequences of {q.shape[2]} heads; a CUDA grid takes at most {MAX_GRID_YZ} of either"


def slot_tables(starts: Tensor, weights: Tensor, num_frames: int, per_frame: int) -> tuple[Tensor, Tensor]:
    """[T + 1, n]: where a slot's denominators begin (int32, -1 if it holds no tile), and its weight. Reads no value."""
    tiles, length = weights.shape
    device = starts.device
    places = torch.arange(length, device=device)
    frames = (starts.long()[:, None] + places) % num_frames  # [J, n]
    begins = torch.full((num_frames + 1, length), -1, dtype=torch.int32, device=device)
    shares = torch.zeros((num_frames + 1, length), dtype=torch.float32, device=device)
    index = (frames, places.expand(tiles, length))
    numbers = torch.arange(tiles * length, device=device, dtype=torch.int32).view(tiles, length)
    begins.index_put_(index, numbers * per_frame)
    shares.index_put_(index, weights)
    begins[num_frames, 0], shares[num_frames, 0] = tiles * length * per_frame, 1.0
    return begins, shares


def geometry(q: Tensor, weights: Tensor, num_frames: int, num_text: int, block: int) -> dict[str, Any]:
    """Sizes that all kernels take."""
    per_frame, length = (q.shape[1] - num_text) // num_frames, weights.shape[1]
    reach = min(2 * length - 1, num_frames)  # frames that share a tile with one
    return {
        "num_frames": num_frames, "per_frame": per_frame, "num_text": num_text,
        "blocks_per_frame": triton.cdiv(per_frame, block), "reach": reach,
        "behind": length - 1 if reach < num_frames else 0,
        "lse_size": weights.numel() * per_frame + num_text, "LENGTH": length,
        "SLOTS": max(2, triton.next_power_of_2(length)), **lane_constants(q.shape[3]),
    }  # fmt: skip


@triton.jit
def locate(block, num_frames, per_frame, num_text, blocks_per_frame, BLOCK: tl.constexpr):
    """(frame, first row, rows) of a block of tokens; text is frame num_frames."""
    video = num_frames * blocks_per_frame
    frame = tl.where(block < video, block // tl.maximum(blocks_per_frame, 1), num_frames)
    first = tl.where(block < video, block % tl.maximum(blocks_per_frame, 1), block - video) * BLOCK
    return frame, first, tl.where(block < video, per_frame, num_text)


@triton.jit
def neighbour(frame, step, num_frames, reach, behind):
    """The step-th frame that may share a tile with `frame`; after all of them comes text."""
    is_text = frame == num_frames
    count = tl.where(is_text, num_frames, reach)
    first = tl.where(is_text, 0, frame - behind + num_frames)
    return tl.where(step < count, (first + step) % num_frames, num_frames)


@triton.jit
def num_neighbours(frame, num_frames, reach):
    return tl.where(frame == num_frames, num_frames, reach) + 1


@triton.jit
def shared_slots(slots, exists, frame, other, num_frames, LENGTH: tl.constexpr):
    """Slots of `frame` whose tiles hold frame `other` too; text is in all of them and sees everything."""
    near = (slots + other - frame + num_frames) % num_frames < LENGTH
    return exists & (near | (frame == num_frames) | (other == num_frames))


@triton.jit
def least_of(lse, shared):
    """Row minima over the shared slots: no weight relative to it exceeds one."""
    return tl.min(tl.where(shared[None, :], lse, float("inf")), 1)


@triton.jit
def mixed(lse, least, factors, shared):
    """Sum over the shared slots of factors 2^(least - lse), per row."""
    return tl.sum(factors * tl.exp2(tl.where(shared[None, :], least[:, None] - lse, float("-inf"))), 1)

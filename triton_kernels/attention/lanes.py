"""Head sizes that are no power of two: a tile of D columns is held as a head tile and a tail tile.

`tl.arange` needs powers of two, so D = 72 would otherwise be computed as 128. As 64 + 16 it costs 80 lanes: two
shorter matrix products instead of one long. D = 128 has no tail.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ..common.refusals import MAX_GRID_YZ, interpreted_bf16

LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
_MAX_HEAD_DIM = 256


def split_lanes(head_dim: int) -> tuple[int, int]:
    """(head lanes, tail lanes), both powers of two of at least 16; no tail is 0.

    >>> split_lanes(72), split_lanes(128), split_lanes(8), split_lanes(112)
    ((64, 16), (128, 0), (16, 0), (128, 0))
    """
    head = max(16, triton.next_power_of_2(head_dim + 1) // 2)
    if head >= head_dim:
        return head, 0
    tail = max(16, triton.next_power_of_2(head_dim - head))
    return (2 * head, 0) if tail == head else (head, tail)


def lane_constants(head_dim: int) -> dict[str, int]:
    """D, D0 and D1 of the kernels."""
    head, tail = split_lanes(head_dim)
    return {"D": head_dim, "D0": head, "D1": tail}


def attention_refuses(q: Tensor, num_sequences: int, softmax_scale: float) -> Iterator[str]:
    """What every attention launcher refuses."""
    yield from interpreted_bf16(q)
    if q.shape[-1] > _MAX_HEAD_DIM:
        yield f"D is {q.shape[-1]}; a tile holds at most {_MAX_HEAD_DIM} columns"
    if softmax_scale <= 0:
        yield f"softmax_scale is {softmax_scale}; it must be positive, since maxima are taken before it is applied"
    if max(num_sequences, q.shape[1]) > MAX_GRID_YZ:
        yield f"{num_sequences} sequences of {q.shape[1]} heads; a CUDA grid takes at most {MAX_GRID_YZ} of either"


@triton.jit
def find_tile(tile, cu_seqlens_ptr, num_sequences, num_steps, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(sequence, index in the sequence) of a tile of rows.

    Tiles of sequence b begin at floor(cu_seqlens[b] GROUP / BLOCK_M) + b, which leaves room for its last, partly
    filled tile; so the grid follows from the shapes alone and the sequence is found by bisection.
    """
    low, high = tile * 0, tile * 0 + num_sequences - 1
    for _ in range(num_steps):
        middle = (low + high + 1) // 2
        is_after = tl.load(cu_seqlens_ptr + middle) * GROUP // BLOCK_M + middle > tile
        high = tl.where(is_after, middle - 1, high)
        low = tl.where(is_after, low, middle)
    return low, tile - (tl.load(cu_seqlens_ptr + low) * GROUP // BLOCK_M + low)


@triton.jit
def load_rows(base_ptr, offsets, mask, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Rows of D elements at `offsets` [R] as tiles [R, D0] and [R, D1]; without a tail the head is given twice."""
    lanes = tl.arange(0, D0)[None, :]
    if D1 > 0:
        head = tl.load(base_ptr + offsets[:, None] + lanes, mask[:, None], other=0.0)
        more = D0 + tl.arange(0, D1)[None, :]
        return head, tl.load(base_ptr + offsets[:, None] + more, mask[:, None] & (more < D), other=0.0)
    else:
        head = tl.load(base_ptr + offsets[:, None] + lanes, mask[:, None] & (lanes < D), other=0.0)
        return head, head


@triton.jit
def store_rows(base_ptr, offsets, head, tail, mask, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Inverse of load_rows."""
    lanes = tl.arange(0, D0)[None, :]
    tl.store(base_ptr + offsets[:, None] + lanes, head, mask[:, None] & (lanes < D))
    if D1 > 0:
        more = D0 + tl.arange(0, D1)[None, :]
        tl.store(base_ptr + offsets[:, None] + more, tail, mask[:, None] & (more < D))


@triton.jit
def zero_rows(ROWS: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """fp32 accumulators [ROWS, D0] and [ROWS, D1]; without a tail a second head that nothing reads."""
    head = tl.zeros([ROWS, D0], tl.float32)
    if D1 > 0:
        return head, tl.zeros([ROWS, D1], tl.float32)
    else:
        return head, head


@triton.jit
def inner_product(a, a_tail, b, b_tail, D1: tl.constexpr):
    """a b^T over head and tail lanes, fp32. a [M, D], b [N, D] -> [M, N]."""
    products = tl.dot(a, tl.trans(b), input_precision="ieee")
    if D1 > 0:
        products = tl.dot(a_tail, tl.trans(b_tail), products, input_precision="ieee")
    return products


@triton.jit
def accumulate(sums, sums_tail, weights, rows, rows_tail, D1: tl.constexpr):
    """sums + weights rows. weights [M, N], rows [N, D], sums [M, D] fp32."""
    sums = tl.dot(weights, rows, sums, input_precision="ieee")
    if D1 > 0:
        sums_tail = tl.dot(weights, rows_tail, sums_tail, input_precision="ieee")
    return sums, sums_tail

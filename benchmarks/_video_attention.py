"""Attention in overlapping tiles of frames, beside torch's attention per tile and the blending of its outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _measure import Bar, Call, Peer, Row
from _video_fusion import sine_plan
from torch import Tensor

from kvkeye import ops

HEADS, HEAD_DIM = 12, 128  # Wan 1.3B
FRAMES, LENGTH, HOP = 20, 8, 2  # four tiles per frame: tiles of 8 frames with overlap 6


@dataclass(frozen=True)
class TiledCall:
    """One problem, computed by the op and tile by tile."""

    ours: Call  # -> [1, S, H, D]
    per_tile: Call  # -> [1, H, S, D], the layout that suits torch
    flops: float  # of the pairs of frames that share a tile, each once

    def check(self, mine: Tensor, other: Tensor) -> None:
        """AssertionError unless the two agree, as closely as their dtype lets them."""
        other = other.transpose(1, 2).float()
        allowed = (2**-7 if mine.dtype == torch.bfloat16 else 1e-5) * float(other.abs().max())
        if (gap := float((mine.float() - other).abs().max())) > allowed:
            raise AssertionError(f"tile_attention: {gap:.2e} from torch; allowed {allowed:.2e}")


def tiled_call(heads: int, per_frame: int, dtype: torch.dtype, device: torch.device) -> TiledCall:
    """FRAMES frames of `per_frame` tokens."""
    starts, weights, _ = (t.to(device) for t in sine_plan([*range(0, FRAMES - LENGTH + 1, HOP)], LENGTH, FRAMES))
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, FRAMES * per_frame, heads, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    heads_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
    firsts = starts.tolist()

    def per_tile() -> Tensor:
        blended = torch.zeros(1, heads, shape[1], HEAD_DIM, device=device)
        for tile, start in enumerate(firsts):
            rows = slice(start * per_frame, (start + LENGTH) * per_frame)
            out = F.scaled_dot_product_attention(*(t[:, :, rows] for t in heads_first))
            blended[:, :, rows] += out * weights[tile].repeat_interleave(per_frame)[:, None]
        return blended.to(dtype)

    share = torch.zeros(FRAMES, FRAMES, dtype=torch.bool)
    for start in firsts:
        share[start : start + LENGTH, start : start + LENGTH] = True
    return TiledCall(
        lambda: ops.tile_attention(q, k, v, starts, weights, FRAMES, 0, HEAD_DIM**-0.5)[0],
        per_tile,
        4.0 * heads * HEAD_DIM * per_frame**2 * int(share.sum()),
    )


def attention_row(dtype: torch.dtype, quick: bool) -> Row:
    """Four tiles per frame, 256 tokens a frame."""
    heads, per_frame = (2, 5) if quick else (HEADS, 256)
    call = tiled_call(heads, per_frame, dtype, torch.device("cpu"))
    name = str(dtype).removeprefix("torch.")
    return Row(
        f"tile_attention, {heads} heads of {HEAD_DIM}, {FRAMES} frames of {per_frame}, 4 tiles per frame, {name}",
        [Peer("torch SDPA per tile, blended", name, call.per_tile)], [Bar("torch SDPA per tile, blended", 1.4)],
        call.ours, lambda made: call.check(*made), flops=call.flops,
    )  # fmt: skip

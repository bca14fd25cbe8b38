"""Attention in overlapping tiles of frames, beside torch's attention per tile and the blending of its outputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from _measure import Bar, Peer, Row
from _video_fusion import sine_plan
from torch import Tensor

from kvkeye import ops

HEADS, HEAD_DIM = 12, 128  # Wan 1.3B


def attention_row(dtype: torch.dtype, quick: bool) -> Row:
    """Four tiles per frame: tiles of 8 frames with overlap 6 over 20 frames of 256 tokens."""
    heads, per_frame = (2, 5) if quick else (HEADS, 256)
    frames, length, hop = 20, 8, 2
    starts, weights, _ = sine_plan([*range(0, frames - length + 1, hop)], length, frames)
    generator = torch.Generator().manual_seed(0)
    shape = (1, frames * per_frame, heads, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    heads_first = [t.transpose(1, 2).contiguous() for t in (q, k, v)]  # the layout that suits torch

    def per_tile() -> Tensor:
        blended = torch.zeros(1, heads, shape[1], HEAD_DIM)
        for tile, start in enumerate(starts.tolist()):
            rows = slice(start * per_frame, (start + length) * per_frame)
            out = F.scaled_dot_product_attention(*(t[:, :, rows] for t in heads_first))
            blended[:, :, rows] += out * weights[tile].repeat_interleave(per_frame)[:, None]
        return blended.to(dtype)

    def verify(made: list[Tensor]) -> None:
        mine, other = made[0].float(), made[1].transpose(1, 2).float()
        allowed = (2**-7 if dtype == torch.bfloat16 else 1e-5) * float(other.abs().max())
        if (gap := float((mine - other).abs().max())) > allowed:
            raise AssertionError(f"tile_attention: {gap:.2e} from torch; allowed {allowed:.2e}")

    share = torch.zeros(frames, frames, dtype=torch.bool)
    for start in starts.tolist():
        share[start : start + length, start : start + length] = True
    flops = 4.0 * heads * HEAD_DIM * per_frame**2 * int(share.sum())
    name = str(dtype).removeprefix("torch.")
    return Row(
        f"tile_attention, {heads} heads of {HEAD_DIM}, {frames} frames of {per_frame}, 4 tiles per frame, {name}",
        [Peer("torch SDPA per tile, blended", name, per_tile)], [Bar("torch SDPA per tile, blended", 1.4)],
        lambda: ops.tile_attention(q, k, v, starts, weights, frames, 0, HEAD_DIM**-0.5)[0], verify, flops=flops,
    )  # fmt: skip

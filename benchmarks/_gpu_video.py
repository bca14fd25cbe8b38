"""Attention in overlapping tiles on a GPU, beside torch's flash attention per tile and the blending of its outputs."""

from __future__ import annotations

from typing import Any

import torch
from _gpu_timing import Times
from _video_attention import HEADS, tiled_call

from kvkeye import ops

PER_FRAME = 1560  # tokens of a latent frame at 480 x 832 in Wan 1.3B
PEER = "SDPA per tile, blended"


def tiles_row(implementation: str, device: torch.device, times: Times, is_rehearsal: bool) -> dict[str, Any]:
    """Figures of four tiles per frame, bf16, after both sides agreed."""
    heads, per_frame = (2, 5) if is_rehearsal else (HEADS, PER_FRAME)
    call = tiled_call(heads, per_frame, torch.bfloat16, device)

    def ours() -> Any:
        with ops.use_backends(implementation):
            return call.ours()

    call.check(ours(), call.per_tile())
    own, other = times([ours, call.per_tile], 10)
    return {"ms": own, "peers_ms": {PEER: other}, "ratio": other / own, "tflop_per_s": call.flops / own / 1e9}

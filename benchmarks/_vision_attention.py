"""Attention of one picture's patches: 16 heads of 72, every patch to every patch, bf16."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _attention_rows import PREFILL
from _measure import Bar, Peer, Row
from torch import Tensor

from kvkeye import ops

HEADS, HEAD_DIM = 16, 72


def attention_row(patches: int) -> Row:
    """Ours from packed rows [S, H, D]; torch's from the layout that suits it, in bf16 and in fp32."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(patches, HEADS, HEAD_DIM, generator=generator).to(torch.bfloat16) for _ in range(3))
    cu_seqlens = torch.tensor([0, patches], dtype=torch.int32)
    scale = HEAD_DIM**-0.5

    def ours() -> Tensor:
        return ops.varlen_attention(q, k, v, cu_seqlens, patches, False, scale)[0]  # type: ignore[no-any-return]

    def sdpa(dtype: torch.dtype, contiguous: bool) -> Callable[[], Tensor]:
        heads = [t.to(dtype).transpose(0, 1)[None] for t in (q, k, v)]  # [1, H, S, D]
        heads = [t.contiguous() if contiguous else t for t in heads]
        return lambda: F.scaled_dot_product_attention(*heads)[0].transpose(0, 1)

    peers = [
        Peer("torch SDPA", f"{str(dtype).removeprefix('torch.')}, {layout}", sdpa(dtype, layout == "heads first"))
        for dtype in (torch.bfloat16, torch.float32)
        for layout in ("heads first", "as packed")
    ]

    def verify(outputs: list[Tensor]) -> None:
        """No further from fp32 than twice torch's bf16, plus a rounding of the output."""
        mine, bf16, *_, truth = (output.float() for output in outputs)
        allowed = 2 * (bf16 - truth).abs().max() + 2**-9 * truth.abs().max()
        if (gap := (mine - truth).abs().max()) > allowed:
            raise AssertionError(f"varlen_attention: {gap:.2e} from fp32; allowed {allowed:.2e}")

    flops = 4.0 * patches**2 * HEADS * HEAD_DIM
    name = f"attention of {patches} patches, {HEADS} heads of {HEAD_DIM}, bf16"
    return Row(name, peers, [Bar("torch SDPA", 3.0)], ours, verify, flops=flops, least_vector=PREFILL)

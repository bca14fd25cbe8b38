"""Attention layers: causal with sectioned rotary embedding for tokens, bidirectional for patches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvkeye import ops
from kvkeye.layers.context import Context, PackedContext, PagedContext
from kvkeye.layers.linear import Linear


class SelfAttention(nn.Module):
    """Grouped-query attention of a decoder layer, heads of q and k normalised before the rotation.

    qkv_proj holds the rows of q, k and v in this order: [(Hq + 2 Hkv) D, input_size]. Without bias.
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        sections: Sequence[int],
        rope_theta: float,
        eps: float,
        layer_index: int,
        input_size: int | None = None,
    ) -> None:
        super().__init__()
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.sections, self.rope_theta, self.eps = list(sections), rope_theta, eps
        self.softmax_scale = head_dim**-0.5
        self.layer_index = layer_index
        self.qkv_proj = Linear(input_size or hidden_size, (num_q_heads + 2 * num_kv_heads) * head_dim, bias=False)
        self.q_norm = nn.Parameter(torch.ones(head_dim))
        self.k_norm = nn.Parameter(torch.ones(head_dim))
        self.o_proj = Linear(num_q_heads * head_dim, hidden_size, bias=False)

    def forward(self, x: Tensor, positions: Tensor, context: Context) -> Tensor:
        """x [T, input_size], positions [3, T] int64 -> [T, hidden]."""
        qkv = self.qkv_proj(x)  # [T, (Hq + 2 Hkv) D]
        if isinstance(context, PackedContext):
            o = self._packed(qkv, positions, context)
        else:
            o = self._paged(qkv, positions, context)
        return self.o_proj(o.flatten(1))  # type: ignore[no-any-return]

    def _packed(self, qkv: Tensor, positions: Tensor, context: PackedContext) -> Tensor:
        q, k = ops.qk_norm_mrope(
            qkv, self.q_norm, self.k_norm, positions, self.sections, self.rope_theta, self.eps, self.num_kv_heads
        )  # [T, Hq, D], [T, Hkv, D]
        v = qkv[:, -self.num_kv_heads * self.head_dim :].unflatten(-1, (self.num_kv_heads, self.head_dim))
        o: Tensor = ops.varlen_attention(q, k, v, context.cu_seqlens, context.max_seqlen, True, self.softmax_scale)[0]
        return o

    def _paged(self, qkv: Tensor, positions: Tensor, context: PagedContext) -> Tensor:
        k_cache, v_cache = context.k_caches[self.layer_index], context.v_caches[self.layer_index]
        scales = context.scales(self.layer_index)
        q = ops.qk_norm_mrope_append(
            qkv, self.q_norm, self.k_norm, positions, k_cache, v_cache, context.slot_mapping,
            self.sections, self.rope_theta, self.eps, *scales,
        )  # fmt: skip
        o: Tensor = ops.paged_attention(
            q, k_cache, v_cache, context.block_table, context.cu_seqlens_q, context.context_lens,
            context.tree_mask, self.softmax_scale, *scales,
        )[0]  # fmt: skip
        return o

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_q_heads}/{self.num_kv_heads}x{self.head_dim}, "
            f"sections={self.sections}, theta={self.rope_theta:g}"
        )


class PatchAttention(nn.Module):
    """Bidirectional attention of packed patches, rotated by a table of angles. qkv [3 d, d]; biases everywhere."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.softmax_scale = (hidden_size // num_heads) ** -0.5
        self.qkv_proj = Linear(hidden_size, 3 * hidden_size)
        self.out_proj = Linear(hidden_size, hidden_size)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, context: PackedContext, residual: Tensor | None = None
    ) -> Tensor:
        """x [N, d], cos and sin [N, D/2] fp32 -> [N, d], added to `residual`; a patch attends to its own segment."""
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # [N, H, D] each
        q, k = ops.rope_2d(q, cos, sin), ops.rope_2d(k, cos, sin)
        o = ops.varlen_attention(q, k, v, context.cu_seqlens, context.max_seqlen, False, self.softmax_scale)[0]
        rows = o.flatten(1)
        return self.out_proj(rows) if residual is None else self.out_proj.add(rows, residual)

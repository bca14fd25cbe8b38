"""What attention needs to know about a forward pass: an argument, never a global.

Knows sequences and caches; must not know requests, tokens or models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedContext:
    """Whole sequences packed one after the other, each attending to itself; no cache. Differentiable.

    cu_seqlens  [B + 1] int32, ascending from 0 to T
    max_seqlen  tokens of the longest sequence
    """

    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], device: torch.device | str | None = None) -> PackedContext:
        """The context of sequences of these lengths, in tokens."""
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        # Made on the host and sent: a tensor made on a GPU would wait for all that runs there.
        is_pinned = device is not None and torch.device(device).type == "cuda"
        table = torch.tensor(bounds, dtype=torch.int32, pin_memory=is_pinned).to(device, non_blocking=True)
        return cls(table, max(lengths, default=0))


@dataclass(frozen=True)
class PagedContext:
    """The newest tokens of each sequence over a paged cache, to which they are appended. Inference only.

    k_caches, v_caches  per layer [N, Hkv, P, D], in the model's dtype or float8_e4m3fn; changed by the forward pass
    block_table         [B, M] int32
    cu_seqlens_q        [B + 1] int32, bounds of each sequence's new tokens
    context_lens        [B] int32, the new tokens included
    slot_mapping        [T] int64, block * P + offset; -1 is not written
    tree_mask           [T] int64 bits, or None for causal order
    k_scales, v_scales  per layer [N, Hkv, P] fp32 with float8_e4m3fn caches; changed with them
    """

    k_caches: Sequence[Tensor]
    v_caches: Sequence[Tensor]
    block_table: Tensor
    cu_seqlens_q: Tensor
    context_lens: Tensor
    slot_mapping: Tensor
    tree_mask: Tensor | None = None
    k_scales: Sequence[Tensor] = ()
    v_scales: Sequence[Tensor] = ()

    def scales(self, layer: int) -> tuple[Tensor, ...]:
        """Those of one layer, keys' and values'; none where the caches have none."""
        return (self.k_scales[layer], self.v_scales[layer]) if self.k_scales else ()


Context = PackedContext | PagedContext

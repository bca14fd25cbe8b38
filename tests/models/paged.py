"""Runs a model over a paged cache in chunks, with blocks placed out of order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvkeye.layers import PagedContext
from kvkeye.models.keye.model import KeyeModel


class PagedRun:
    """One cache for `batch` sequences of at most `max_len` tokens; `step` appends tokens to each."""

    def __init__(self, model: KeyeModel, batch: int, max_len: int, block_size: int = 32) -> None:
        text = model.config.text
        per_sequence = -(-max_len // block_size)
        num_blocks = batch * per_sequence + 1
        shape = (num_blocks, text.num_key_value_heads, block_size, text.head_dim)
        self.model, self.block_size = model, block_size
        # NaN where nothing was written: a read past the context would show.
        self.k_caches = [torch.full(shape, float("nan"), dtype=model.dtype) for _ in range(text.num_hidden_layers)]
        self.v_caches = [torch.full(shape, float("nan"), dtype=model.dtype) for _ in range(text.num_hidden_layers)]
        order = torch.randperm(num_blocks - 1) + 1
        self.block_table = order.view(batch, per_sequence).to(torch.int32)
        self.lengths = [0] * batch

    def step(self, embeds: Sequence[Tensor], positions: Sequence[Tensor]) -> list[Tensor]:
        """embeds [n_b, H] and positions [3, n_b] of each sequence's new tokens -> hidden states [n_b, H] of each."""
        counts = [len(e) for e in embeds]
        slots = [self._slots(b, n) for b, n in enumerate(counts)]
        self.lengths = [length + n for length, n in zip(self.lengths, counts)]
        context = PagedContext(
            self.k_caches,
            self.v_caches,
            self.block_table,
            torch.tensor([0, *counts]).cumsum(0).to(torch.int32),
            torch.tensor(self.lengths, dtype=torch.int32),
            torch.cat(slots),
        )
        hidden = self.model(torch.cat(list(embeds)), torch.cat(list(positions), 1), context)
        return list(hidden.split(counts))

    def _slots(self, sequence: int, count: int) -> Tensor:
        index = torch.arange(self.lengths[sequence], self.lengths[sequence] + count)
        return self.block_table[sequence].long()[index // self.block_size] * self.block_size + index % self.block_size

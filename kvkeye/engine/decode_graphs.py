"""Recorded steps of few tokens: decoding, verification, and short chunks beside them, in any mixture.

A step is padded to the next size. Padding tokens are sequences of one token that write no keys and values and that
nobody reads; a size has as many sequences as tokens, so that one recording serves every division into rows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvkeye.engine.batch import ForwardBatch, TokenInputs
from kvkeye.engine.graphs import RecordedPass, Recorder, smallest

logger = logging.getLogger("kvkeye.engine")
MAX_TOKENS = 256  # of a recorded step; above it launches are a small part of the time


def token_sizes(most: int) -> list[int]:
    """Sizes up to the first that holds `most` tokens, at most MAX_TOKENS: steps of a half, then of an eighth."""
    sizes = [1, 2, 4, *range(8, 32, 8), *range(32, 128, 16), *range(128, MAX_TOKENS + 1, 32)]
    place = next((i for i, size in enumerate(sizes) if size >= most), len(sizes) - 1)
    return sizes[: place + 1]


def padded(inputs: TokenInputs, size: int, width: int) -> TokenInputs:
    """The same step with `size` tokens, as many sequences, and tables of `width` blocks."""
    num_tokens, num_rows = len(inputs.token_ids), len(inputs.context_lens)
    spare = size - num_tokens
    bounds = torch.arange(num_tokens + 1, size + 1, dtype=torch.int32)
    contexts = torch.ones(spare, dtype=torch.int32)
    empty = num_tokens - num_rows  # sequences without tokens, at the end
    return TokenInputs(
        token_ids=pad(inputs.token_ids, (0, spare)),
        positions=pad(inputs.positions, (0, spare)),
        block_table=pad(inputs.block_table, (0, width - inputs.block_table.shape[1], 0, size - num_rows)),
        cu_seqlens_q=pad(torch.cat((inputs.cu_seqlens_q, bounds)), (0, empty), value=size),
        context_lens=pad(torch.cat((inputs.context_lens, contexts)), (0, empty)),
        slot_mapping=pad(inputs.slot_mapping, (0, spare), value=-1),
        tree_mask=None if inputs.tree_mask is None else pad(inputs.tree_mask, (0, spare), value=1),
    )


def nothing(size: int, width: int = 1, is_branched: bool = False) -> TokenInputs:
    """A step of padding alone: it changes nothing."""
    none, short = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
    empty = TokenInputs(
        token_ids=none,
        positions=none.view(3, 0),
        block_table=short.view(0, 0),
        cu_seqlens_q=torch.zeros(1, dtype=torch.int32),
        context_lens=short,
        slot_mapping=none,
        tree_mask=none if is_branched else None,
    )
    return padded(empty, size, width)


class DecodeGraphs:
    """Recorded passes from `TokenInputs` to what `body` makes of each of their tokens.

    outputs  [sizes[-1], ...] each: where results lie, shared by all sizes
    sizes    ascending numbers of tokens;  width: blocks of the longest context
    trees    whether steps with branched proposals are recorded too
    """

    def __init__(
        self,
        body: Callable[[TokenInputs], Sequence[Tensor]],
        outputs: Sequence[Tensor],
        sizes: Sequence[int],
        width: int,
        record: Recorder,
        trees: bool = False,
    ) -> None:
        self._sizes, self._width, self._trees, self._outputs = list(sizes), width, trees, outputs
        self._passes: dict[tuple[int, bool], RecordedPass] = {}
        for size in reversed(self._sizes):
            for is_branched in (False, True) if trees else (False,):
                first = nothing(size, width, is_branched)
                self._passes[size, is_branched] = RecordedPass(first, [kept[:size] for kept in outputs], body, record)
                logger.info("recorded a step of %d tokens%s", size, ", branched" if is_branched else "")

    def fit(self, batch: ForwardBatch) -> ForwardBatch | None:
        """The step in the next size, or None if it is not one of those that are recorded."""
        inputs = batch.inputs
        size = smallest(self._sizes, len(inputs.token_ids))
        if size is None or batch.media or (inputs.tree_mask is not None and not self._trees):
            return None
        return replace(batch, inputs=padded(inputs, size, self._width))

    def __call__(self, inputs: TokenInputs, packed: Tensor) -> Sequence[Tensor]:
        """Results [size, ...] of a step that `fit` padded and `to_device` moved; the next step overwrites them."""
        return self._passes[len(inputs.token_ids), inputs.tree_mask is not None](packed)
